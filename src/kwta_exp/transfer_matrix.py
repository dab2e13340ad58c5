"""Who fools whom: adversarial images of each network, tried on all.

    kwta-exp transfer RUN_FOLDER RUN_FOLDER... [--attack bpda] [--n 200] [--eps 8/255]

Each run's network is attacked, and what was found is tried on every other, on the test images that the other
classifies correctly. All runs must be of the same data. Threat and number of images are the first run's unless
they are given. Stopped, the same command continues.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kwta_exp.attacks import APGD, BPDA, PGD, Attack, Threat, Transfer
from kwta_exp.config import build
from kwta_exp.data.base import Images
from kwta_exp.data.batches import first_test_images
from kwta_exp.errors import UserError
from kwta_exp.evaluation import Diagnosis, Roles, evaluate, summarise
from kwta_exp.naming import as_name
from kwta_exp.parts import planned_network
from kwta_exp.plan import Plan
from kwta_exp.storage import held, sha256_of_file, sha256_of_json, write_text

BATCH_SIZE = 250

ATTACKS = {"pgd": PGD, "apgd": APGD, "bpda": BPDA}
"""What the images are made with, at 20 steps."""


@dataclass(frozen=True)
class Question:
    """What is asked of the runs.

    Args:
        attack: a name in :data:`ATTACKS`.
        n: test images; ``None`` for all.
        eps: the radius; ``None`` for the first run's.
        seed: of the attack.
    """

    attack: str = "pgd"
    n: int | None = None
    eps: float | None = None
    seed: int = 0


def matrix(plans: Mapping[str, Plan], asked: Question, work: Path) -> dict[str, Any]:
    """Accuracies left, ``{"threat", "runs", "left": {target: {source: accuracy}}}``.

    Args:
        plans: of judging each run again (:func:`~kwta_exp.plan.plan_to_judge`), by its name.
        asked: the attack and its threat.
        work: where records are kept.

    Raises:
        UserError: for runs of different data.
    """
    first = next(iter(plans.values()))
    images, fingerprint = _images(plans)
    recorded = build(first.cfg, "threat", Threat)
    threat = Threat(norm=recorded.norm, eps=recorded.eps if asked.eps is None else asked.eps)
    networks = {
        name: planned_network(plan, images).eval().requires_grad_(False) for name, plan in plans.items()
    }
    suite = {name: _from(name, network, asked.attack, threat) for name, network in networks.items()}
    identity = {
        "weights": {name: plan.weights and sha256_of_file(plan.weights) for name, plan in plans.items()},
        "threat": [threat.norm, threat.eps],
        "asked": [asked.attack, asked.n, asked.seed],
        "data": fingerprint,
    }
    folder = work / sha256_of_json(identity)[:10]
    test = first_test_images(images, asked.n, torch.device("cpu"))
    left: dict[str, dict[str, float]] = {}
    with held(folder):
        for target, network in networks.items():
            clean, records, inapplicable = evaluate(
                network, test, suite, threat, asked.seed, BATCH_SIZE, folder / target
            )
            found = summarise({"name": target}, threat, clean, records, inapplicable, {}, Roles(), Diagnosis())
            left[target] = {"clean": found["clean"]["accuracy"]} | {
                source: result["robust_accuracy"] for source, result in found["attacks"].items()
            }
    result = {
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "attack": asked.attack,
        "n": len(test),
        "left": left,
    }
    write_text(folder / "matrix.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def names(folders: Sequence[Path]) -> dict[str, Path]:
    """The run folders by names that tell them apart.

    Raises:
        UserError: if one is given twice.
    """
    named = {as_name(f"{path.resolve().parent.name}-{path.resolve().name}"): path for path in folders}
    if len(named) < len(folders):
        raise UserError("RUN_FOLDER: given twice; expected different runs")
    return named


def _images(plans: Mapping[str, Plan]) -> tuple[Images, str]:
    """The data of all runs, and what tells it from other data."""
    fingerprints = {plan.dataset.fingerprint(): name for name, plan in plans.items()}
    if len(fingerprints) > 1:
        raise UserError(f"{', '.join(fingerprints.values())}: of different data; expected the same")
    return next(iter(plans.values())).dataset.load(), next(iter(fingerprints))


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
