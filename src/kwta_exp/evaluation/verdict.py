"""Whether a robust accuracy can be believed.

An attack that succeeds is proof; only survival needs belief. So far two verdicts can be earned:
``masked``, by an attack that undoes what plain gradients left standing, and ``untested``. None that
speaks for a network can: the checks it would take are not here yet.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kwta_exp.attacks import PGD, Attack

THOROUGH_STEPS = 20
"""Steps below which plain PGD is too weak to be the claim: any stronger attack would beat it."""

MASKED_GAP = 0.05
"""Share of the images that plain PGD must miss, at least, for gradients to be called masked. A
convention of this project: on a network with honest gradients, better attacks gain less."""


def plain_gradient_attacks(suite: Mapping[str, Attack]) -> list[str]:
    """The attacks of a suite whose number a paper would quote: PGD on the cross-entropy, thorough enough."""
    return [
        name
        for name, attack in suite.items()
        if isinstance(attack, PGD)
        and attack.loss == "ce"
        and not attack.momentum
        and attack.steps >= THOROUGH_STEPS
    ]


def verdict(
    attacks: Sequence[str],
    fooled_plainly: npt.NDArray[np.bool_],
    fooled: npt.NDArray[np.bool_],
    has_plain: bool,
) -> dict[str, Any]:
    """``masking`` of results.json.

    Args:
        attacks: names of those that ran.
        fooled_plainly: images ``(n,)`` fooled by a thorough plain gradient attack.
        fooled: images fooled by any attack.
        has_plain: whether there was such a plain attack.

    ``masked`` if the share of images that fell, but not to plain PGD, is above :data:`MASKED_GAP`
    with 95% confidence (the lower end of its Wilson interval; the images are the same, so the
    comparison is paired).
    """
    if not attacks:
        why = "No attack ran: this evaluation says nothing about robustness."
        return {"verdict": "untested", "explanation": why, "flags": []}

    missed = int((fooled & ~fooled_plainly).sum())
    if has_plain:
        from scipy.stats import binomtest  # slow to import

        certain = binomtest(missed, len(fooled)).proportion_ci(0.95, method="wilson").low
        if certain > MASKED_GAP:
            why = (
                f"Plain PGD leaves out {missed} of {len(fooled)} images that other attacks fool: its gradients"
                " are masked, and its number is no measure of robustness. Quote the worst case, as an upper"
                " bound: a better attack may leave less."
            )
            flag = {
                "check": "gain_over_plain_pgd",
                "value": missed / len(fooled),
                "lower95": float(certain),
                "threshold": MASKED_GAP,
                "source": "Athalye, Carlini and Wagner 2018, section 3; the threshold is a convention",
            }
            return {"verdict": "masked", "explanation": why, "flags": [flag]}

    why = (
        f"{', '.join(attacks)} ran, and none of the checks that could back a claim of robustness: what is"
        " left standing is an upper bound, and a better attack may leave far less."
    )
    return {"verdict": "untested", "explanation": why, "flags": []}
