"""Whether a robust accuracy can be believed.

An attack that succeeds is proof; only an image that no attack fooled needs belief. There are four verdicts:
``masked``, plain gradients miss what other attacks fool; ``suspect``, a check says that the worst case itself
is too high; ``sound``, plain PGD and a thorough search without gradients ran, the attacks passed the
binarization test, and no check says that they missed something; ``untested``, everything else.

The thresholds were set on one set of networks and tried on another: ``docs/calibration.md``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kwta_exp.evaluation.checks import CHECKS

MIN_QUERIES = 1000
"""Forward passes an image from which a search without gradients counts as thorough."""


@dataclass(frozen=True)
class Tried:
    """What an evaluation tried.

    Attributes:
        attacks: whether any attack ran.
        baseline_pgd: whether thorough plain PGD was among them.
        without_gradient: whether an attack ran that needs outputs alone, with :data:`MIN_QUERIES` or more for
            each image that it did not fool.
        checks: whether the network was checked for masked gradients.
    """

    attacks: bool = True
    baseline_pgd: bool = True
    without_gradient: bool = True
    checks: bool = True


def verdict(
    measured: Mapping[str, float], n: int, tried: Tried, named: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """``masking`` of results.json.

    Args:
        measured: values by the name of their check, without the checks that were not made.
        n: images in the paired comparisons.
        tried: what was tried beside them.
        named: what the meaning of a raised check should name, by check.

    ``flags`` are the checks that are raised, ``passed`` the others that were made.
    """
    entries = [_entry(name, measured[name], n) for name in CHECKS if name in measured]
    flags = [
        {**entry, "meaning": _meaning(entry["check"], named)}
        for entry in entries
        if entry.get("lower95", entry["value"]) > entry["threshold"]
    ]
    raised = {flag["check"] for flag in flags}
    passed = [entry for entry in entries if entry["check"] not in raised]

    doubts = "; ".join(flag["meaning"] for flag in flags if flag["bears_on"] == "worst case")
    others = "; ".join(flag["meaning"] for flag in flags if flag["bears_on"] != "worst case")
    pgd_is_behind = "gain_over_plain_pgd" in raised
    signs = any(CHECKS[name].sign for name in raised)
    missed = round(measured.get("gain_over_plain_pgd", 0) * n)
    checked = {"binarization_missed", "repeating_finds_more"} <= measured.keys()
    if not tried.attacks:
        found = "untested"
        why = "No attack ran, so this evaluation says nothing about robustness."
    elif pgd_is_behind and (signs or not tried.checks):
        found = "masked"
        why = (
            f"Plain PGD misses {missed} of {n} images that other attacks fool: gradients are masked. Do not"
            " quote the plain-PGD number. Quote the worst case, as an upper bound: a stronger attack may leave"
            " less."
        )
        if doubts:
            why += f" The worst case may itself be too high: {doubts}."
    elif doubts:
        found = "suspect"
        why = f"The worst case may be too high: {doubts}. Do not quote it as robustness."
    elif checked and tried.baseline_pgd and tried.without_gradient:
        found = "sound"
        why = (
            "The attacks passed the binarization test, one that needs no gradients was among them, and no check"
            " says that they missed something. The worst case can be quoted, with its threat and interval."
        )
        if others:
            why += f" Do not quote the plain-PGD number: {others}."
    else:
        found = "untested"
        why = (
            "Not all checks that a claim of robustness needs were made (suite=strong makes them). The robust"
            " accuracy is an upper bound: a stronger attack may leave far less."
        )
    if pgd_is_behind and found != "masked":
        why += f" Plain PGD is weak here: it misses {missed} of {n} images, with no sign of masking."
    return {"verdict": found, "explanation": why, "flags": flags, "passed": passed}


def _meaning(check: str, named: Mapping[str, str]) -> str:
    what = named.get(check)
    return f"{CHECKS[check].meaning} ({what})" if what else CHECKS[check].meaning


def _entry(name: str, value: float, n: int) -> dict[str, Any]:
    check = CHECKS[name]
    return {
        "check": name,
        "value": value,
        **({"lower95": _lower95(value, n)} if check.paired else {}),
        "threshold": check.threshold,
        "source": check.source,
        "bears_on": check.bears_on,
    }


def _lower95(share: float, n: int) -> float:
    from scipy.stats import binomtest  # slow to import

    return float(binomtest(round(share * n), n).proportion_ci(0.95, method="wilson").low) if n else 0.0
