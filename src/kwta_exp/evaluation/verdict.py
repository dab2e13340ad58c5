"""Whether a robust accuracy can be believed.

An attack that succeeds is proof; only survival needs belief. Four verdicts: ``masked``, plain gradients leave
standing what other attacks fool; ``suspect``, something says that the worst case itself is too high; ``sound``,
plain PGD and a search without gradients tried in earnest, the attacks found what was planted for them, and no
check says that they missed something; ``untested``, else.

The thresholds were set on one set of networks and tried on another: ``docs/calibration.md``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_OBFUSCATED = "Athalye, Carlini and Wagner 2018, section 3.1"
_EVALUATING = "Carlini et al. 2019"
_BINARIZATION = "Zimmermann et al. 2022"

BearsOn = Literal["plain gradients", "worst case"]


@dataclass(frozen=True)
class Check:
    """Something measured, and from where on it counts.

    Attributes:
        threshold: what the value (or the lower end of its 95% interval, where it has one) must exceed.
        bears_on: what is in doubt then: the number under plain gradients, or the worst case itself.
        source: where the check is from.
        meaning: what it means, in words.
    """

    threshold: float
    bears_on: BearsOn
    source: str
    meaning: str


CHECKS: dict[str, Check] = {
    "gain_over_plain_pgd": Check(
        0.05, "plain gradients", _OBFUSCATED, "other attacks fool images that plain PGD leaves standing"
    ),
    "single_step_finds_more": Check(
        0.02, "plain gradients", _OBFUSCATED, "one step fools images that iterating does not"
    ),
    "black_box_finds_more": Check(
        0.02, "worst case", _OBFUSCATED, "attacks without gradients fool images that no gradient attack does"
    ),
    "robust_at_large_eps": Check(
        0.05, "worst case", _OBFUSCATED, "PGD fails where any image can be made any other"
    ),
    "gradients_are_zero": Check(0.05, "worst case", _EVALUATING, "gradients vanish on PGD's way"),
    "gradients_are_not_finite": Check(0.0, "worst case", _EVALUATING, "gradients are NaN or infinite"),
    "change_unseen_by_gradients": Check(
        0.2, "plain gradients", _OBFUSCATED, "the loss changes in ways that its gradient does not tell"
    ),
    "last_is_not_best": Check(
        0.1, "plain gradients", _EVALUATING, "PGD ends below the best point it came through"
    ),
    "still_rising": Check(0.1, "plain gradients", _EVALUATING, "PGD has not converged"),
    "outputs_are_probabilities": Check(
        0.5, "plain gradients", _EVALUATING, "the network returns probabilities, on which losses saturate"
    ),
    "outputs_are_random": Check(
        0.0, "worst case", _OBFUSCATED, "the network answers the same question in different ways"
    ),
    "random_search_finds_more": Check(
        0.0, "worst case", _OBFUSCATED, "random points fool images that no attack does"
    ),
    "repeating_finds_more": Check(
        0.01, "worst case", _EVALUATING, "the same attack, repeated, fools more images"
    ),
    "binarization_missed_by_pgd": Check(
        0.0625, "plain gradients", _BINARIZATION, "plain PGD misses adversarial examples planted for it"
    ),
    "binarization_missed": Check(
        0.05, "worst case", _BINARIZATION, "the attacks miss adversarial examples planted for them"
    ),
}
"""Every check. All values are shares, and larger ones are worse."""

WITH_INTERVAL = {
    "gain_over_plain_pgd", "single_step_finds_more", "black_box_finds_more", "repeating_finds_more",
}  # fmt: skip
"""Shares that are compared by the lower end of their interval: of the images that every attack was run on,
those that some fool and others do not. The images are the same, so these are paired comparisons."""


SIGNS = {
    "robust_at_large_eps", "gradients_are_zero", "gradients_are_not_finite", "change_unseen_by_gradients",
    "last_is_not_best", "outputs_are_probabilities", "outputs_are_random", "binarization_missed_by_pgd",
}  # fmt: skip
"""Signs that gradients are masked. Where they were looked for and none is there, plain PGD that lags behind
other attacks is merely weak: on any network other losses, and targets, find a little more."""

LEAST_QUERIES = 1000
"""Forward passes an image for which a search without gradients counts as one."""


@dataclass(frozen=True)
class Tried:
    """What an evaluation tried.

    Attributes:
        attacks: whether any attack ran.
        plain: whether thorough plain PGD was among them.
        without_gradient: whether one ran that asks for outputs alone, :data:`LEAST_QUERIES` times at least for
            each image that withstood it.
        checks: whether masked gradients were looked for.
    """

    attacks: bool = True
    plain: bool = True
    without_gradient: bool = True
    checks: bool = True


def verdict(measured: Mapping[str, float], n: int, tried: Tried) -> dict[str, Any]:
    """``masking`` of results.json.

    Args:
        measured: values by the name of their check; a check that was not made is not there.
        n: images behind the paired comparisons.
        tried: what there was beside them.

    ``flags`` are the checks that are raised, ``passed`` the others that were made.
    """
    flags, passed = [], []
    for name, check in CHECKS.items():
        if name not in measured:
            continue
        entry: dict[str, Any] = {"check": name, "value": measured[name]}
        compared = measured[name]
        if name in WITH_INTERVAL:
            compared = entry["lower95"] = _lower95(measured[name], n)
        entry |= {"threshold": check.threshold, "source": check.source, "bears_on": check.bears_on}
        if compared > check.threshold:
            flags.append({**entry, "meaning": check.meaning})
        else:
            passed.append(entry)

    raised = {flag["check"] for flag in flags}
    doubts = [flag["meaning"] for flag in flags if flag["bears_on"] == "worst case"]
    lags = "gain_over_plain_pgd" in raised
    missed = f"{round(measured.get('gain_over_plain_pgd', 0) * n)} of {n} images"
    whole = {"binarization_missed", "repeating_finds_more"} <= measured.keys()
    if not tried.attacks:
        found = "untested"
        why = "No attack ran: this evaluation says nothing about robustness."
    elif lags and (raised & SIGNS or not tried.checks):
        found = "masked"
        why = (
            f"Plain PGD leaves out {missed} that other attacks fool: its gradients are masked, and its number"
            " is no measure of robustness. Quote the worst case, as an upper bound: a better attack may leave"
            " less."
        )
        if doubts:
            why += f" And it may well be too high: {'; '.join(doubts)}."
    elif doubts:
        found = "suspect"
        why = f"The worst case may be too high: {'; '.join(doubts)}. Do not quote it as robustness."
    elif whole and tried.plain and tried.without_gradient:
        found = "sound"
        why = (
            "The attacks found the adversarial examples planted for them, one that needs no gradients was among"
            " them, and no check says that they missed something. The worst case can be quoted, for this"
            " threat and with its interval."
        )
        others = [flag["meaning"] for flag in flags]
        if others:
            why += f" Not so the number under plain gradients: {'; '.join(others)}."
    else:
        found = "untested"
        why = (
            "The checks that could back a claim of robustness were not all made (suite=strong makes them): what"
            " is left standing is an upper bound, and a better attack may leave far less."
        )
    if lags and found != "masked":
        why += f" Plain PGD is weak here: it leaves out {missed} that others fool, with no sign of masking."
    return {"verdict": found, "explanation": why, "flags": flags, "passed": passed}


def _lower95(share: float, n: int) -> float:
    from scipy.stats import binomtest  # slow to import

    return float(binomtest(round(share * n), n).proportion_ci(0.95, method="wilson").low) if n else 0.0
