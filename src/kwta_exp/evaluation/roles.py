"""What the attacks of a suite are to a verdict."""

from collections.abc import Mapping
from dataclasses import dataclass

from kwta_exp.attacks import PGD, Attack, Threat

THOROUGH_STEPS = 20
"""Steps below which plain PGD is too weak to be the claim: any stronger attack would beat it."""


@dataclass(frozen=True)
class Roles:
    """Names of attacks.

    Attributes:
        plain: those whose number a paper would quote: untargeted PGD on the cross-entropy in the threat's own
            ball, with enough steps, and steps long enough to reach its edge from the other side.
        single_step: gradient attacks of one step.
    """

    plain: tuple[str, ...] = ()
    single_step: tuple[str, ...] = ()

    @classmethod
    def of(cls, suite: Mapping[str, Attack], threat: Threat) -> "Roles":
        gradient = {name: attack for name, attack in suite.items() if isinstance(attack, PGD)}
        plain = [
            name
            for name, attack in gradient.items()
            if attack.loss == "ce"
            and not attack.momentum
            and not attack.targets
            and attack.steps >= THOROUGH_STEPS
            and (attack.norm, attack.eps) == (threat.norm, threat.eps)
            and _way(attack) >= 2 * threat.eps
        ]
        return cls(tuple(plain), tuple(name for name, attack in gradient.items() if attack.steps == 1))


def _way(attack: PGD) -> float:
    """How far all steps together may lead."""
    if attack.step_size is None:
        return attack.relative_step_size * attack.eps
    return attack.step_size * attack.steps
