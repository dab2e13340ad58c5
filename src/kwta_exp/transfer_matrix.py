"""How adversarial examples transfer: those made for each network are tried on every other network.

    kwta-exp transfer RUN_FOLDER RUN_FOLDER... [--attack bpda] [--n 200] [--eps 8/255]

Each network is attacked on the test images that the target network classifies correctly. All runs must use the
same data. The threat is the first run's, unless a radius is given. If the command is stopped, the same command
continues.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kwta_exp.attacks import Attack, Threat, Transfer
from kwta_exp.config import build, plain
from kwta_exp.data.batches import first_test_images
from kwta_exp.errors import UserError
from kwta_exp.evaluation import Evaluation, summarise
from kwta_exp.naming import as_name
from kwta_exp.parts import built_suite, planned_network
from kwta_exp.plan import Plan
from kwta_exp.storage import guarded, sha256_of_file, sha256_of_json, write_text
from kwta_exp.trained_networks import same_data


def overrides_for(attack: str, eps: float | None) -> list[str]:
    """The overrides for one attack, an option of the group ``attack``, and a radius."""
    chosen = ["suite=none", f"+attack@attack.{attack}={attack}"]
    return chosen if eps is None else [*chosen, f"threat.eps={eps}"]


def matrix(plans: Mapping[str, Plan], n: int | None, seed: int, work: Path) -> dict[str, Any]:
    """Measure robust accuracies, ``{"threat", "attack", "n", "robust": {target: {source: accuracy}}}``.

    Args:
        plans: for each run's name, a plan from :func:`~kwta_exp.plan.plan_to_judge` with :func:`overrides_for`.
        n: the number of test images; ``None`` for all.
        seed: seed of the attack.
        work: folder for the records.

    Raises:
        UserError: if the runs use different data.
    """
    first = next(iter(plans.values()))
    images, fingerprint = same_data(plans)
    threat = build(first.cfg, "threat", Threat)
    ((name, attack),) = built_suite(first.cfg, threat).items()
    networks = {run: planned_network(plan, images).eval().requires_grad_(False) for run, plan in plans.items()}
    suite = {run: _transfer_from(run, network, attack) for run, network in networks.items()}
    identity = {
        "weights": {run: plan.weights and sha256_of_file(plan.weights) for run, plan in plans.items()},
        "threat": [threat.norm, threat.eps],
        "attack": plain(first.cfg, "attack"),
        "images": [n, seed, fingerprint],
    }
    folder = work / sha256_of_json(identity)[:10]
    test = first_test_images(images, n, torch.device("cpu"))
    robust: dict[str, dict[str, float]] = {}
    with guarded(folder):
        for target, network in networks.items():
            evaluation = Evaluation(network, test, suite, threat, folder / target, seed)
            found = summarise({"name": target}, evaluation, evaluation.run())
            robust[target] = {"clean": found["clean"]["accuracy"]} | {
                source: result["robust_accuracy"] for source, result in found["attacks"].items()
            }
    result = {
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "attack": name,
        "n": len(test),
        "robust": robust,
    }
    write_text(folder / "matrix.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def names(folders: Sequence[Path]) -> dict[str, Path]:
    """The run folders by unique names.

    Raises:
        UserError: if a folder is given twice.
    """
    named = {as_name(f"{path.resolve().parent.name}-{path.resolve().name}"): path for path in folders}
    if len(named) < len(folders):
        raise UserError("RUN_FOLDER: the same folder is given twice; expected different runs")
    return named


def _transfer_from(name: str, network: nn.Module, attack: Attack) -> Transfer:
    transfer = Transfer(source=name, attack=attack)
    transfer.connect(network)
    return transfer


def text(found: Mapping[str, Any]) -> str:
    """The matrix as text, with a row for each source and a column for each target."""
    targets = list(found["robust"])
    threat = found["threat"]
    lines = [
        f"robust accuracy, {threat['norm']} eps {threat['eps']:.4g}, {found['attack']}, n = {found['n']};"
        " rows: source network, columns: target network",
    ]
    lines += [f"{number}: {name}" for number, name in enumerate(targets, 1)]
    lines.append(" " * 8 + "".join(f"{number:>8}" for number in range(1, len(targets) + 1)))
    for label, source in [("clean", "clean"), *((str(i), name) for i, name in enumerate(targets, 1))]:
        cells = [found["robust"][target].get(source) for target in targets]
        lines.append(f"{label:>8}" + "".join("     n/a" if c is None else f"{100 * c:7.1f}%" for c in cells))
    return "\n".join(lines)
