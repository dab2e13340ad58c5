"""Attacks of the foolbox library behind this project's interface."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from kwta_exp.attacks.threat import Threat
from kwta_exp.randomness import isolated


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

    Raises:
        ValueError: if an attack with a fixed epsilon belongs to another norm.
    """

    def __init__(self, attack: Any, threat: Threat) -> None:
        from foolbox.attacks.base import MinimizationAttack  # slow to import, and few runs need it

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
        with torch.enable_grad(), isolated(int(keys.sum())):
            if self.minimum_norm:
                found, _, _ = self.attack(foolbox_model, x, y, epsilons=None)
            else:
                _, found, _ = self.attack(foolbox_model, x, y, epsilons=self.threat.eps)
        return self.threat.project(torch.as_tensor(found).detach(), x)
