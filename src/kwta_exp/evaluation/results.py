"""From records to ``results.json``: accuracies with intervals, the worst case, and the verdict."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kwta_exp.attacks import Threat
from kwta_exp.evaluation.records import Record
from kwta_exp.evaluation.verdict import verdict

SCHEMA = 1


def summarise(
    run: Mapping[str, Any],
    threat: Threat,
    clean: Record,
    attacks: Mapping[str, Record],
    inapplicable: Mapping[str, str],
    details: Mapping[str, Mapping[str, Any]],
    plain: Collection[str],
    diagnostic_n: int | None = None,
) -> dict[str, Any]:
    """The content of ``results.json`` (documented in the README).

    Args:
        run: who this is: name, seed, command and the like.
        threat: the evaluation's.
        clean: the clean record over all n images.
        attacks: one record each, in the suite's order.
        inapplicable: why the suite's other attacks had no hold on the network.
        details: what an attack wishes to say of what it found in the network.
        plain: names of those that are thorough plain gradient attacks, for the verdict.
        diagnostic_n: how many of the images every attack was run on; ``None`` for all.

    An attack's own ``robust_accuracy`` is over those images, since of the others it saw only what stood;
    ``cumulative`` and the worst case are over all n.

    ``worst_case.by`` gives each attack the share of the n images that it was the first in the
    suite's order to fool, so that clean accuracy minus these shares is the worst case.
    """
    right = clean.columns["prediction"] == clean.columns["label"]
    first = slice(len(right) if diagnostic_n is None else diagnostic_n)
    standing = right.copy()
    by: dict[str, float] = {}
    per_attack: dict[str, Any] = {}
    fooled_plainly = np.zeros_like(right)
    for name, record in attacks.items():
        fooled = _fooled(clean, record)
        by[name] = float(np.mean(standing & fooled))
        standing &= ~fooled
        if name in plain:
            fooled_plainly |= fooled
        per_attack[name] = {
            **_accuracy((right & ~fooled)[first], "robust_accuracy"),
            "cumulative": float(np.mean(standing)),
            "eps": threat.eps,
            "norm": threat.norm,
            "forwards": record.forwards,
            "backwards": record.backwards,
            "seconds": round(record.seconds, 3),
            **details.get(name, {}),
        }
    return {
        "schema": SCHEMA,
        "run": dict(run),
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "clean": _accuracy(right, "accuracy"),
        "attacks": per_attack,
        "worst_case": {**_accuracy(standing, "robust_accuracy"), "by": by} if attacks else None,
        "inapplicable": dict(inapplicable),
        "masking": verdict(list(attacks), fooled_plainly[first], (right & ~standing)[first], bool(plain)),
    }


def _fooled(clean: Record, record: Record) -> npt.NDArray[np.bool_]:
    """Which of all images an attack fooled."""
    fooled = np.zeros(len(clean), dtype=np.bool_)
    if len(record):
        position = {index: place for place, index in enumerate(clean.columns["index"].tolist())}
        places = [position[index] for index in record.columns["index"].tolist()]
        fooled[places] = record.columns["fooled"]
    return fooled


def _accuracy(outcomes: npt.NDArray[np.bool_], name: str) -> dict[str, Any]:
    from scipy.stats import binomtest  # slow to import

    count, n = int(outcomes.sum()), len(outcomes)
    interval = binomtest(count, n).proportion_ci(0.95, method="wilson")
    return {name: count / n, "n": n, "ci95": [float(interval.low), float(interval.high)]}
