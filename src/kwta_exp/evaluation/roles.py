"""The part that each attack of a suite plays in a verdict."""

from collections.abc import Mapping
from dataclasses import dataclass

from kwta_exp.attacks import PGD, Attack, Threat

THOROUGH_STEPS = 20
"""Steps below which PGD is no fair baseline: any stronger attack would beat it."""


@dataclass(frozen=True)
class Roles:
    """Names of attacks.

    Attributes:
        baseline_pgd: the attacks whose number a paper would quote: untargeted PGD on the cross-entropy in the
            evaluation's threat, with enough steps, long enough together to cross the ball.
        single_step: gradient attacks of one step.
    """

    baseline_pgd: tuple[str, ...] = ()
    single_step: tuple[str, ...] = ()

    @classmethod
    def of(cls, suite: Mapping[str, Attack], threat: Threat) -> "Roles":
        """The roles in ``suite`` under ``threat``."""
        pgd = {name: attack for name, attack in suite.items() if isinstance(attack, PGD)}
        baseline = [
            name
            for name, attack in pgd.items()
            if attack.loss == "ce"
            and not attack.momentum
            and not attack.targets
            and attack.steps >= THOROUGH_STEPS
            and attack.threat == threat
            and attack.steps * attack.actual_step_size >= 2 * threat.eps
        ]
        return cls(tuple(baseline), tuple(name for name, attack in pgd.items() if attack.steps == 1))
