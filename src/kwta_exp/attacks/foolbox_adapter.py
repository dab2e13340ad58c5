"""Attacks of the foolbox library behind this project's interface."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from kwta_exp.attacks.base import frozen
from kwta_exp.attacks.threat import Threat
from kwta_exp.randomness import isolated

BROKEN = {
    "L2FMNAttack": "it never projects, so what it calls adversarial lies where it likes",
    "LInfFMNAttack": "it never projects, so what it calls adversarial lies where it likes",
    "L1FMNAttack": "it never projects, so what it calls adversarial lies where it likes",
    "L0FMNAttack": "it never projects, so what it calls adversarial lies where it likes",
    "PointwiseAttack": "it fails when asked for its smallest change",
    **dict.fromkeys(
        (
            "L0BrendelBethgeAttack",
            "L1BrendelBethgeAttack",
            "L2BrendelBethgeAttack",
            "LinfinityBrendelBethgeAttack",
        ),
        "it compiles for half a minute in every process, and what it finds has not been checked here",
    ),
}
"""Attacks of foolbox 3.3.4 that do not do what they say, or not here."""


class FoolboxAttack:
    """Runs a ``foolbox.attacks.*`` object against a threat.

    A minimum-norm attack, of whatever norm, is asked for its unclipped result: the smallest change it
    finds, projected into the threat where it lies outside. Any other attack runs at ``threat.eps``,
    so its norm must be the threat's.

    Args:
        attack: the foolbox object.
        threat: the ball its result will be scored in.

    foolbox draws from global generators. They are seeded from the images' keys for the call and put
    back after, so outcomes depend on nothing but the batch.

    A decision-based attack must begin at an image that is misclassified, and foolbox gives up on a whole
    batch where one has none. So starting points are looked for first, and images without one are returned
    as they are.

    Raises:
        ValueError: if an attack with a fixed epsilon belongs to another norm, or is known to be broken.
    """

    def __init__(self, attack: Any, threat: Threat) -> None:
        from foolbox.attacks.base import MinimizationAttack  # slow to import, and few runs need it

        if reason := BROKEN.get(type(attack).__name__):
            raise ValueError(f"foolbox's {type(attack).__name__} is not to be used: {reason}")
        self.attack = attack
        self.threat = threat
        self.minimum_norm = isinstance(attack, MinimizationAttack)
        p = getattr(getattr(attack, "distance", None), "p", None)
        if not self.minimum_norm and p != {"linf": math.inf, "l2": 2}[threat.norm]:
            raise ValueError(
                f"{type(attack).__name__} works in L{p}, the threat in {threat.norm}; expected the same norm"
            )

    def __repr__(self) -> str:
        return f"FoolboxAttack({self.attack!r}, {self.threat!r})"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """What foolbox returns for ``x``; see :class:`~kwta_exp.attacks.Attack`."""
        from foolbox.models.pytorch import PyTorchModel

        foolbox_model = PyTorchModel(model, bounds=(0, 1), device=x.device)
        with torch.enable_grad(), frozen(model), isolated(int(keys.sum())):
            if hasattr(self.attack, "init_attack"):
                found = self._from_starting_points(foolbox_model, x, y)
            elif self.minimum_norm:
                found, _, _ = self.attack(foolbox_model, x, y, epsilons=None)
            else:
                _, found, _ = self.attack(foolbox_model, x, y, epsilons=self.threat.eps)
        return self.threat.project(torch.as_tensor(found).detach(), x)

    def _from_starting_points(self, foolbox_model: Any, x: Tensor, y: Tensor) -> Tensor:
        """Run a decision-based attack on the images that have a misclassified image to begin at."""
        from foolbox.attacks.blended_noise import LinearSearchBlendedUniformNoiseAttack

        first = self.attack.init_attack or LinearSearchBlendedUniformNoiseAttack(steps=50)
        starts = torch.as_tensor(first.run(foolbox_model, x, y))
        with torch.no_grad():
            able = torch.as_tensor(foolbox_model(starts)).argmax(1) != y
        found = x.clone()
        if able.any():
            found[able], _, _ = self.attack(
                foolbox_model, x[able], y[able], starting_points=starts[able], epsilons=None
            )
        return found


def adapted(attack: Any, threat: Threat) -> Any:
    """An attack of foolbox behind this project's interface; any other as it is."""
    return FoolboxAttack(attack, threat) if type(attack).__module__.startswith("foolbox.") else attack
