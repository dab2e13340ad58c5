"""Counts the queries of an attack, in all and for each image."""

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from kwta_exp.attacks import Threat
from kwta_exp.attacks.base import forward_is_exact
from kwta_exp.attacks.losses import ranking_margin
from kwta_exp.attacks.relaxing import unseen

_ROUNDING = 1e-6
"""How far float32 may carry an image over the edge of its ball."""

_RECENT = 16
"""How many calls' owners are remembered: an attack takes turns through its micro-batches."""


class QueryCounter(nn.Module):
    """A network that counts the images sent through it and the gradients sent back.

    An attack sends its images in any number and order. Each query counts for the nearest of the clean images,
    in the threat's norm; as long as clean images are more than two radii apart, a query inside a ball counts
    for the centre of that ball.

    It shares the network's parameters and mode.

    Args:
        network: images to logits; one with ``draws`` passes for each image has as many counted.
        x: the clean images ``(N, C, H, W)``.
        y: their labels.
        threat: which queries count as successes.

    Attributes:
        forwards: images sent through the network.
        backwards: gradients that arrived at its logits.
        fooled: bool ``(N,)``, which images had a misclassified query inside the threat.
        queries: int64 ``(N,)``, forward passes spent on each image up to and including the batch with its first
            misclassified query inside the threat; all of them, if there was none.
        steps: int64 ``(N,)``, backward passes spent on it until then.
    """

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> None:
        super().__init__()
        self.network = network
        self.forwards = 0
        self.backwards = 0
        self.queries = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.steps = torch.zeros_like(self.queries)
        self.fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._y = y
        self._threat = threat
        self._owners = Owners(x, threat)
        self._passes = int(getattr(network, "draws", 1))
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        self.forwards += len(x) * self._passes
        with torch.no_grad(), unseen():
            owner = self._owners(x)
            self.queries += self._each(owner, torch.full_like(owner, self._passes)) * ~self.fooled
            change = self._threat.distance(x, self._owners.x[owner].to(x))
            inside = (change <= self._threat.eps + _ROUNDING) & ((x >= 0) & (x <= 1)).flatten(1).all(1)
            if forward_is_exact.get():
                error = ranking_margin(logits, self._y[owner]) > 0
                self.fooled |= self._each(owner, (inside & error).long()) > 0
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self._count_backward(gradient, owner))
        return logits

    def _each(self, owner: Tensor, numbers: Tensor) -> Tensor:
        """The sum of the numbers of each owner; on a GPU, unlike ``bincount``, without waiting for it."""
        return torch.zeros_like(self.queries).scatter_add_(0, owner, numbers)

    def _count_backward(self, gradient: Tensor, owner: Tensor) -> Any:
        self.backwards += len(gradient) * self._passes
        self.steps += self._each(owner, torch.full_like(owner, self._passes)) * ~self.fooled


class Owners:
    """The owner of an image: the nearest of ``x`` in the norm of ``threat``; of identical ones, any.

    On a CPU, the owners of recent calls are tried first, then one owner for all. Either is correct if every
    image is nearer to its owner than half the owner's distance to the closest other; only otherwise are all
    distances computed. On a GPU they always are, because a trial would make the host wait for its outcome.
    """

    def __init__(self, x: Tensor, threat: Threat) -> None:
        self.x = x
        self._threat = threat
        self._p = float("inf") if threat.norm == "linf" else 2.0
        self._safe = x.new_zeros(0)
        self._recent: deque[Tensor] = deque([torch.arange(len(x), device=x.device)], maxlen=_RECENT)
        self._guesses = x.device.type == "cpu"
        if len(x) and self._guesses:
            apart = self._distances(x)
            apart = apart.masked_fill(apart == 0, float("inf"))  # an identical image does not matter
            self._safe = apart.amin(1) / 2

    def __call__(self, images: Tensor) -> Tensor:
        """The owners, int64 ``(M,)``."""
        if not len(images):
            return torch.zeros(0, dtype=torch.long, device=self.x.device)
        images = images.detach().to(self.x.dtype)
        if not self._guesses:
            return self._distances(images).argmin(1)
        for guess in [each for each in self._recent if len(each) == len(images)]:
            if self._surely(images, guess):
                return guess
        alone = self._distances(images[:1]).argmin(1).expand(len(images))
        owner = alone if self._surely(images, alone) else self._distances(images).argmin(1)
        self._recent.append(owner)
        return owner

    def only(self, keep: Tensor) -> "Owners":
        """The owners where ``keep``, bool ``(N,)``, alone."""
        return Owners(self.x[keep], self._threat)

    def _surely(self, images: Tensor, owner: Tensor) -> bool:
        return bool((self._threat.distance(images, self.x[owner]) < self._safe[owner]).all())

    def _distances(self, images: Tensor) -> Tensor:
        # Through a matrix product, the L2 distance of an image to itself is as large as that to its neighbours.
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cdist(images.flatten(1), self.x.flatten(1), p=self._p, compute_mode=exact)
