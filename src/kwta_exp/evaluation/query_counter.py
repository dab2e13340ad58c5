"""Counting what an attack asks of a network, in all and for each image."""

from typing import Any

import torch
from torch import Tensor, nn

from kwta_exp.attacks import Threat
from kwta_exp.attacks.base import answers_are_exact
from kwta_exp.attacks.losses import excess

_ROUNDING = 1e-6
"""How far float32 may carry an image over the edge of its ball."""


class QueryCounter(nn.Module):
    """A network that counts the images it is shown and those it returns gradients for, whoever asks.

    An attack sends its images in any number and order. Each query is booked on the nearest of the originals,
    in the threat's norm; so long as originals are further apart than two radii, nothing inside a ball can be
    booked on another's account.

    It shares the network's parameters and mode.

    Args:
        network: to be asked.
        x: the original images ``(N, C, H, W)``.
        y: their labels.
        threat: which queries count as successes.

    Attributes:
        forwards: images sent through the network.
        backwards: gradients that arrived at its logits.
        queries: int64 ``(N,)``, forward passes spent on each image up to and with the batch that held
            its first misclassified query inside the threat; all of them, if there was none.
        steps: int64 ``(N,)``, backward passes spent on it until then.
    """

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> None:
        super().__init__()
        self.network = network
        self.forwards = 0
        self.backwards = 0
        self.queries = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.steps = torch.zeros_like(self.queries)
        self._standing = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self._y = y
        self._threat = threat
        self._owners = Owners(x, threat)
        self.train(network.training)

    @property
    def seen_to_err(self) -> Tensor:
        """Which of the originals had a misclassified query inside the threat, bool ``(N,)``."""
        return ~self._standing

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        self.forwards += len(x)
        with torch.no_grad():
            owner = self._owners(x)
            self.queries += torch.bincount(owner, minlength=len(self.queries)) * self._standing
            change = self._threat.distance(x, self._owners.x[owner].to(x))
            inside = (change <= self._threat.eps + _ROUNDING) & ((x >= 0) & (x <= 1)).flatten(1).all(1)
            if answers_are_exact.get():
                self._standing[owner[inside & (excess(logits, self._y[owner]) > 0)]] = False
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self._count_backward(gradient, owner))
        return logits

    def _count_backward(self, gradient: Tensor, owner: Tensor) -> Any:
        self.backwards += len(gradient)
        self.steps += torch.bincount(owner, minlength=len(self.steps)) * self._standing


class Owners:
    """Which of ``x`` each of many images is nearest to, in the norm of ``threat``; of identical ones, any.

    The answer to the last question is tried first, then a single owner for all. Either is right where every
    image is nearer to it than half its distance to the closest other; only else is every distance computed.
    """

    def __init__(self, x: Tensor, threat: Threat) -> None:
        self.x = x
        self._threat = threat
        self._p = float("inf") if threat.norm == "linf" else 2.0
        self._safe = x.new_zeros(0)
        if len(x):
            apart = self._distances(x)
            self._safe = apart.masked_fill(apart == 0, float("inf")).amin(1) / 2  # a copy is no rival
        self._last = torch.arange(len(x), device=x.device)

    def __call__(self, images: Tensor) -> Tensor:
        """The owners, int64 ``(M,)``."""
        images = images.detach().to(self.x.dtype)
        guesses = [self._last] if len(self._last) == len(images) else []
        if len(images) and not (guesses and self._surely(images, guesses[0])):
            alone = self._distances(images[:1]).argmin(1).expand(len(images))
            self._last = alone if self._surely(images, alone) else self._distances(images).argmin(1)
        return self._last if len(images) else self._last[:0]

    def only(self, keep: Tensor) -> "Owners":
        """The owners where ``keep``, bool ``(N,)``, alone."""
        return Owners(self.x[keep], self._threat)

    def _surely(self, images: Tensor, owner: Tensor) -> bool:
        return bool((self._threat.distance(images, self.x[owner]) < self._safe[owner]).all())

    def _distances(self, images: Tensor) -> Tensor:
        return torch.cdist(images.flatten(1), self.x.flatten(1), p=self._p)
