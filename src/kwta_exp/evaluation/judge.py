"""Decides whether an image is fooled: the exact network, evaluated twice."""

import copy
import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


class Judgement(NamedTuple):
    """The logits ``(N, K)`` of images, and which are misclassified and confirmed to be, bool ``(N,)``."""

    logits: Tensor
    misclassified: Tensor
    confirmed: Tensor


class Judge:
    """A network in float32, frozen and in eval mode, and a second opinion on its errors.

    A winner-take-all network is discontinuous, so rounding alone can flip a prediction, and rounding depends on
    the size of the batch. So batches are padded to one size. An error counts if it occurs in float32 in such a
    batch, and again either in a batch of another size or in float64.

    Args:
        network: images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``.
        batch_size: of the padded batches.
    """

    def __init__(self, network: nn.Module, batch_size: int) -> None:
        self.network = network
        self.batch_size = batch_size
        self._double: nn.Module | None = None
        self._has_double = True

    def __call__(self, x: Tensor, y: Tensor) -> Judgement:
        """Classify ``x`` and confirm the errors."""
        logits = self.logits(x)
        wrong = misclassified(logits, y)
        confirmed = wrong.clone()
        confirmed[wrong] = self._misclassified_again(x[wrong], y[wrong])
        return Judgement(logits, wrong, confirmed)

    def logits(self, x: Tensor) -> Tensor:
        """Logits in float32, whatever precision the run trains in."""
        return self._in_batches(x, self.batch_size)

    def _in_batches(self, x: Tensor, size: int) -> Tensor:
        return torch.cat([self._padded(some, size) for some in x.split(size)])

    @torch.no_grad()
    def _padded(self, x: Tensor, size: int) -> Tensor:
        missing = size - len(x)
        full = torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing and len(x) else x
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.network(full)
        return logits[: len(x)]

    def _misclassified_again(self, x: Tensor, y: Tensor) -> Tensor:
        if not len(x):
            return torch.zeros(0, dtype=torch.bool, device=x.device)
        other_size = self.batch_size // 2 if self.batch_size > 1 else 2
        again = misclassified(self._in_batches(x, other_size), y)
        again[~again] = self._misclassified_in_double(x[~again], y[~again])
        return again

    @torch.no_grad()
    def _misclassified_in_double(self, x: Tensor, y: Tensor) -> Tensor:
        if len(x) and self._has_double:
            try:
                if self._double is None:
                    self._double = copy.deepcopy(self.network).double()
                with torch.autocast(x.device.type, enabled=False):
                    again = [self._double(some.double()) for some in x.split(self.batch_size)]
                return misclassified(torch.cat(again), y)
            except Exception as error:  # a network may require float32 in any way
                self._has_double = False
                log.info("the network does not run in float64 (%s); errors are confirmed in float32", error)
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)


def predicted(logits: Tensor) -> Tensor:
    """The class, or -1 where a logit is NaN: no class is predicted, and that is an error."""
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Which predictions are wrong, bool ``(N,)``."""
    return predicted(logits) != y
