"""Attacks of the foolbox library behind this project's interface."""

from typing import Any

import torch
from torch import Tensor, nn

from kwta_exp.attacks.threat import Threat


class FoolboxAttack:
    """Runs a ``foolbox.attacks.*`` object at the radius of a threat.

    Args:
        attack: any foolbox attack that takes a numeric epsilon.
        threat: the ball its result is scored in. A minimum-norm attack's result is clipped to
            ``threat.eps`` by foolbox in the attack's own norm.

    foolbox draws from torch's global generator. It is seeded from the images' keys for the call and
    put back after, so outcomes depend on nothing but the batch.
    """

    def __init__(self, attack: Any, threat: Threat) -> None:
        self.attack = attack
        self.threat = threat

    def __repr__(self) -> str:
        return f"FoolboxAttack({self.attack!r}, {self.threat!r})"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        from foolbox.models.pytorch import PyTorchModel  # slow to import, and few runs need it

        foolbox_model = PyTorchModel(model, bounds=(0, 1), device=x.device)
        devices = [x.device] if x.is_cuda else []
        with torch.enable_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(keys.sum()))
            _, clipped, _ = self.attack(foolbox_model, x, y, epsilons=self.threat.eps)
        return torch.as_tensor(clipped).detach()
