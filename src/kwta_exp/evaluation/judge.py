"""The one who says whether an image is fooled: the exact network, asked twice."""

import copy
import logging

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


class Judge:
    """A network in float32, frozen and in eval mode, and a second opinion on its errors.

    A winner-take-all network is discontinuous, so that rounding alone can flip a prediction, and how a
    library rounds depends on how many images it gets. So batches are padded to one size. An error counts
    if it is made in float32 in such a batch, and again in one of another size or else in float64.

    Args:
        network: images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``.
        batch_size: of the padded batches.
    """

    def __init__(self, network: nn.Module, batch_size: int) -> None:
        self.network = network
        self.batch_size = batch_size
        self._double: nn.Module | None = None
        self._has_double = True

    def logits(self, x: Tensor) -> Tensor:
        """Logits in float32, whatever precision the run trains in."""
        return self._in_batches(x, self.batch_size)

    def _in_batches(self, x: Tensor, size: int) -> Tensor:
        return torch.cat([self._padded(some, size) for some in x.split(size)])

    def _padded(self, x: Tensor, size: int) -> Tensor:
        missing = size - len(x)
        full = torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing and len(x) else x
        return self._asked(full)[: len(x)]

    @torch.no_grad()
    def _asked(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.network(x)
        return logits

    def confirmed(self, x: Tensor, y: Tensor) -> Tensor:
        """Which of these images, all misclassified once, are misclassified again; bool ``(N,)``."""
        if not len(x):
            return torch.zeros(0, dtype=torch.bool, device=x.device)
        other_size = self.batch_size // 2 if self.batch_size > 1 else 2
        again = misclassified(self._in_batches(x, other_size), y)
        again[~again] = self._errs_in_double(x[~again], y[~again])
        return again

    @torch.no_grad()
    def _errs_in_double(self, x: Tensor, y: Tensor) -> Tensor:
        if len(x) and self._has_double:
            try:
                if self._double is None:
                    self._double = copy.deepcopy(self.network).double()
                with torch.autocast(x.device.type, enabled=False):
                    again = [self._double(some.double()) for some in x.split(self.batch_size)]
                return misclassified(torch.cat(again), y)
            except Exception as error:  # somebody's network that insists on float32, in whatever way
                self._has_double = False
                log.info(
                    "no float64 copy of the network runs (%s); errors are confirmed in float32 alone", error
                )
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)


def predicted(logits: Tensor) -> Tensor:
    """The class, or -1 where a logit is NaN: no class is predicted, and that is an error."""
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Which predictions are wrong, bool ``(N,)``."""
    return predicted(logits) != y
