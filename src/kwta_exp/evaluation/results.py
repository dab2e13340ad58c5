"""From records to ``results.json``: accuracies with intervals, the worst case, and the verdict."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kwta_exp.attacks import Threat
from kwta_exp.evaluation.diagnostics import Diagnosis
from kwta_exp.evaluation.records import Record
from kwta_exp.evaluation.roles import Roles
from kwta_exp.evaluation.verdict import LEAST_QUERIES, Tried, verdict

SCHEMA = 1


def summarise(
    run: Mapping[str, Any],
    threat: Threat,
    clean: Record,
    attacks: Mapping[str, Record],
    inapplicable: Mapping[str, str],
    details: Mapping[str, Mapping[str, Any]],
    roles: Roles,
    diagnosis: Diagnosis,
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
        roles: what the suite's attacks are to the verdict.
        diagnosis: what was measured beside them.
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
    fooled_by: dict[str, npt.NDArray[np.bool_]] = {}
    for name, record in attacks.items():
        fooled = fooled_by[name] = _fooled(clean, record)
        by[name] = float(np.mean(standing & fooled))
        standing &= ~fooled
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
    compared = {name: fooled[first] for name, fooled in fooled_by.items()}
    black_box = [name for name, record in attacks.items() if len(record) and not record.backwards]
    measured = {**_comparisons(compared, roles, black_box), **diagnosis.measured}
    tried = Tried(
        attacks=bool(attacks),
        plain=any(name in attacks for name in roles.plain),
        without_gradient=any(_searches(attacks[name]) for name in black_box),
        checks=diagnosis.n > 0,
    )
    masking = verdict(measured, len(right[first]), tried)
    return {
        "schema": SCHEMA,
        "run": dict(run),
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "clean": _accuracy(right, "accuracy"),
        "attacks": per_attack,
        "worst_case": {**_accuracy(standing, "robust_accuracy"), "by": by} if attacks else None,
        "inapplicable": dict(inapplicable),
        "masking": {**masking, "checks_n": diagnosis.n, "planted": diagnosis.planted},
    }


def _searches(record: Record) -> bool:
    """Whether an attack without gradients asked often enough; a transferred one asks nothing."""
    asked = record.columns["queries"][~record.columns["fooled"]]
    return record.forwards > 0 and (len(asked) == 0 or int(asked.min()) >= LEAST_QUERIES)


def _comparisons(
    fooled_by: Mapping[str, npt.NDArray[np.bool_]], roles: Roles, black_box: Collection[str]
) -> dict[str, float]:
    """Shares of the images that some attacks fool and others do not, by the name of the check."""

    def only(these: Collection[str], not_those: Collection[str]) -> float:
        by_these, by_those = (
            np.any([fooled_by[name] for name in names], axis=0) for names in (these, not_those)
        )
        return float((by_these & ~by_those).mean())

    plain = [name for name in roles.plain if name in fooled_by]
    single = [name for name in roles.single_step if name in fooled_by]
    with_gradient = [name for name in fooled_by if name not in black_box]
    found = {}
    if plain:
        found["gain_over_plain_pgd"] = only(list(fooled_by), plain)
    if plain and single:
        found["single_step_finds_more"] = only(single, plain)
    if black_box and with_gradient:
        found["black_box_finds_more"] = only(black_box, with_gradient)
    return found


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
