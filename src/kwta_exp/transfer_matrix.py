"""Who fools whom: adversarial images of each network, tried on all.

    python -m kwta_exp.transfer_matrix RUN_FOLDER RUN_FOLDER... [--attack surrogate] [--n 200] [--eps 8/255]

Each run's network is attacked, and what was found is tried on every other, on the test images that the other
classifies correctly. All runs must be of the same data. Threat and number of images are the first run's unless
they are given. Stopped, the same command continues.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from kwta_exp.attacks import APGD, PGD, Attack, SurrogatePGD, Threat, Transfer
from kwta_exp.config import build, check_trust, plain, recorded_config
from kwta_exp.data.base import Images
from kwta_exp.data.batches import first_test_images
from kwta_exp.errors import UserError
from kwta_exp.evaluation import Diagnosis, Roles, evaluate, summarise
from kwta_exp.fields import Eps
from kwta_exp.parts import network_of_run
from kwta_exp.plan import source_run
from kwta_exp.storage import held, sha256_of_file, sha256_of_json, write_text

BATCH_SIZE = 250

ATTACKS = {"pgd": PGD, "apgd": APGD, "surrogate": SurrogatePGD}
"""What the images are made with, at 20 steps."""


def matrix(
    folders: Sequence[Path], attack: str, n: int | None, eps: float | None, seed: int, work: Path
) -> dict[str, Any]:
    """Accuracies left, ``{"threat", "runs", "left": {target: {source: accuracy}}}``.

    Args:
        folders: of finished runs.
        attack: a name in :data:`ATTACKS`.
        n: test images; ``None`` for all.
        eps: the radius; ``None`` for the first run's.
        seed: of the attack.
        work: where records are kept.

    Raises:
        UserError: for a folder without a finished training, or runs of different data.
    """
    sources = {_name(folder): source_run(str(folder), "RUN_FOLDER")[0] for folder in folders}
    if len(sources) < len(folders):
        raise UserError("RUN_FOLDER: given twice; expected different runs")
    first = recorded_config(folders[0])
    images, fingerprint = _images(folders)
    recorded = plain(first, "threat")
    threat = Threat(norm=recorded["norm"], eps=recorded["eps"] if eps is None else eps)
    networks = {
        name: network_of_run(str(folder), "RUN_FOLDER", images).eval().requires_grad_(False)
        for name, folder in zip(sources, folders, strict=True)
    }
    suite = {name: _from(name, network, attack, threat) for name, network in networks.items()}
    identity = {
        "weights": {name: sha256_of_file(path) for name, path in sources.items()},
        "threat": [threat.norm, threat.eps],
        "asked": [attack, n, seed],
        "data": fingerprint,
    }
    folder = work / sha256_of_json(identity)[:10]
    test = first_test_images(images, n, torch.device("cpu"))
    left: dict[str, dict[str, float]] = {}
    with held(folder):
        for target, network in networks.items():
            clean, records, inapplicable = evaluate(
                network, test, suite, threat, seed, BATCH_SIZE, folder / target
            )
            found = summarise({"name": target}, threat, clean, records, inapplicable, {}, Roles(), Diagnosis())
            left[target] = {"clean": found["clean"]["accuracy"]} | {
                source: result["robust_accuracy"] for source, result in found["attacks"].items()
            }
    result = {
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "attack": attack,
        "n": len(test),
        "left": left,
    }
    write_text(folder / "matrix.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def _name(folder: Path) -> str:
    path = folder.resolve()
    return f"{path.parent.name}-{path.name}"


def _images(folders: Sequence[Path]) -> tuple[Images, str]:
    """The data of all runs, and what tells it from other data."""
    fingerprints: dict[str, Path] = {}
    loaded: Images | None = None
    for folder in folders:
        cfg = recorded_config(folder)
        check_trust(cfg, "dataset", folder)
        dataset = build(cfg, "dataset")
        fingerprints[json.dumps(dataset.fingerprint(), sort_keys=True, default=str)] = folder
        loaded = loaded or dataset.load()
    if len(fingerprints) > 1:
        raise UserError(f"{', '.join(map(str, fingerprints.values()))}: of different data; expected the same")
    assert loaded is not None
    return loaded, next(iter(fingerprints))


def _from(name: str, network: nn.Module, attack: str, threat: Threat) -> Transfer:
    chosen: Attack = ATTACKS[attack](norm=threat.norm, eps=threat.eps, steps=20)
    transfer = Transfer(source=name, attack=chosen)
    transfer.connect(network)
    return transfer


def text(found: Mapping[str, Any]) -> str:
    """The matrix, a row a source and a column a target."""
    targets = list(found["left"])
    threat = found["threat"]
    lines = [
        f"accuracy left, {threat['norm']} eps {threat['eps']:.4g}, {found['attack']}, n = {found['n']};"
        " rows: images made on, columns: network judged",
    ]
    lines += [f"{number}: {name}" for number, name in enumerate(targets, 1)]
    lines.append(" " * 8 + "".join(f"{number:>8}" for number in range(1, len(targets) + 1)))
    for label, source in [("clean", "clean"), *((str(i), name) for i, name in enumerate(targets, 1))]:
        cells = [found["left"][target].get(source) for target in targets]
        lines.append(f"{label:>8}" + "".join("     n/a" if c is None else f"{100 * c:7.1f}%" for c in cells))
    return "\n".join(lines)


def _eps(given: str) -> float:
    try:
        return TypeAdapter(Eps).validate_python(given)
    except ValidationError as error:
        raise argparse.ArgumentTypeError(error.errors()[0]["msg"]) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_FOLDER")
    parser.add_argument("--attack", choices=list(ATTACKS), default="pgd", help="makes the images (pgd)")
    parser.add_argument("--n", type=int, help="test images (all)")
    parser.add_argument("--eps", type=_eps, help="radius, such as 8/255 (the first run's)")
    parser.add_argument("--seed", type=int, default=0, help="of the attack (0)")
    parser.add_argument("--work", type=Path, default=Path("outputs/transfer"), help="where records are kept")
    asked = parser.parse_args(arguments)
    try:
        print(text(matrix(asked.folders, asked.attack, asked.n, asked.eps, asked.seed, asked.work)))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
