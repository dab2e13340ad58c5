"""From records to ``results.json``: accuracies with intervals, the worst case, and the verdict."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kwta_exp.attacks import Threat
from kwta_exp.evaluation.records import Record

SCHEMA = 1


def summarise(
    run: Mapping[str, Any], threat: Threat, clean: Record, attacks: Mapping[str, Record]
) -> dict[str, Any]:
    """The content of ``results.json`` (documented in the README).

    Args:
        run: who this is: name, seed, command and the like.
        threat: the evaluation's.
        clean: the clean record over all n images.
        attacks: one record each, over the images that are correct clean, in the suite's order.

    ``worst_case.by`` gives each attack the share of the n images that it was the first in the
    suite's order to fool, so that clean accuracy minus these shares is the worst case.
    """
    right = clean.columns["prediction"] == clean.columns["label"]
    standing = right.copy()
    by: dict[str, float] = {}
    per_attack: dict[str, Any] = {}
    for name, record in attacks.items():
        survives = right.copy()
        if len(record):
            survives[np.flatnonzero(right)[record.columns["fooled"]]] = False
        by[name] = float(np.mean(standing & ~survives))
        standing &= survives
        per_attack[name] = {
            **_accuracy(survives, "robust_accuracy"),
            "cumulative": float(np.mean(standing)),
            "eps": threat.eps,
            "norm": threat.norm,
            "forwards": record.forwards,
            "backwards": record.backwards,
            "seconds": round(record.seconds, 3),
        }
    return {
        "schema": SCHEMA,
        "run": dict(run),
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "clean": _accuracy(right, "accuracy"),
        "attacks": per_attack,
        "worst_case": {**_accuracy(standing, "robust_accuracy"), "by": by} if attacks else None,
        "masking": verdict(attacks),
    }


def verdict(attacks: Mapping[str, Record]) -> dict[str, Any]:
    """Whether the worst case can be believed.

    ``untested`` is the only verdict this version can earn: it has no adaptive attack and none of
    the checks that could show gradient masking, or its absence.
    """
    if attacks:
        why = (
            f"Only {', '.join(attacks)} ran. Such attacks are known to overrate networks with"
            " discontinuous activations; the true robust accuracy may be far lower."
        )
    else:
        why = "No attack ran: this evaluation says nothing about robustness."
    return {"verdict": "untested", "explanation": why, "flags": []}


def _accuracy(outcomes: npt.NDArray[np.bool_], name: str) -> dict[str, Any]:
    from scipy.stats import binomtest  # slow to import

    count, n = int(outcomes.sum()), len(outcomes)
    interval = binomtest(count, n).proportion_ci(0.95, method="wilson")
    return {name: count / n, "n": n, "ci95": [float(interval.low), float(interval.high)]}
