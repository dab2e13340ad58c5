"""Attacks of the foolbox library, and plain functions, as attacks of this project."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from kwta_exp.attacks.base import Attack, CallableAttack, Connected, frozen
from kwta_exp.attacks.threat import Threat
from kwta_exp.randomness import isolated

BROKEN = {
    "L2FMNAttack": "it never projects, so its images may lie outside the threat",
    "LInfFMNAttack": "it never projects, so its images may lie outside the threat",
    "L1FMNAttack": "it never projects, so its images may lie outside the threat",
    "L0FMNAttack": "it never projects, so its images may lie outside the threat",
    "PointwiseAttack": "it fails when it runs without an epsilon",
    **dict.fromkeys(
        (
            "L0BrendelBethgeAttack",
            "L1BrendelBethgeAttack",
            "L2BrendelBethgeAttack",
            "LinfinityBrendelBethgeAttack",
        ),
        "it compiles for half a minute in every process, and its results have not been checked here",
    ),
}
"""Attacks of foolbox 3.3.4 that do not work, with the reason."""


class FoolboxAttack(Attack):
    """Runs a ``foolbox.attacks.*`` object against a threat.

    A minimum-norm attack, of any norm, runs without an epsilon: it returns the smallest change it finds, which
    is projected into the threat if it lies outside. Any other attack runs at ``threat.eps``, so its norm must
    be the threat's.

    Args:
        attack: the foolbox object.
        threat: the ball its result will be scored in.

    foolbox draws from global generators. They are seeded from the images' keys for the call and restored
    after it, so outcomes depend on nothing but the batch.

    A decision-based attack must begin at an image that is misclassified, and foolbox rejects a whole batch if
    one image has none. So starting points are searched first, and images without one are returned unchanged.

    Raises:
        ValueError: if an attack with a fixed epsilon belongs to another norm, or is known to be broken.
    """

    def __init__(self, attack: Any, threat: Threat) -> None:
        from foolbox.attacks.base import MinimizationAttack  # slow to import, and few runs need it

        if reason := BROKEN.get(type(attack).__name__):
            raise ValueError(f"foolbox's {type(attack).__name__} is not to be used: {reason}")
        self.attack = attack
        self.norm, self.eps = threat.norm, threat.eps
        self.minimum_norm = isinstance(attack, MinimizationAttack)
        p = getattr(getattr(attack, "distance", None), "p", None)
        if not self.minimum_norm and p != {"linf": math.inf, "l2": 2}[threat.norm]:
            raise ValueError(
                f"{type(attack).__name__} works in L{p}, the threat in {threat.norm}; expected the same norm"
            )

    def __repr__(self) -> str:
        return f"FoolboxAttack({self.attack!r}, {self.threat!r})"

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """What foolbox returns for ``x``; see :class:`~kwta_exp.attacks.Attack`."""
        from foolbox.models.pytorch import PyTorchModel

        foolbox_model = PyTorchModel(Connected(model), bounds=(0, 1), device=x.device)
        with torch.enable_grad(), frozen(model), isolated(int(keys.sum())):
            if hasattr(self.attack, "init_attack"):
                found = self._from_starting_points(foolbox_model, x, y)
            elif self.minimum_norm:
                found, _, _ = self.attack(foolbox_model, x, y, epsilons=None)
            else:
                _, found, _ = self.attack(foolbox_model, x, y, epsilons=self.eps)
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


def as_attack(attack: Any, threat: Threat) -> Attack:
    """``attack`` itself, or a foolbox attack or a function ``(model, x, y, keys) -> x_adv``, adapted to
    ``threat``.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(attack, Attack):
        return attack
    if type(attack).__module__.startswith("foolbox."):
        return FoolboxAttack(attack, threat)
    if not callable(attack):
        raise ValueError(f"{attack!r} cannot be called; expected an attack")
    return CallableAttack(attack, threat)
