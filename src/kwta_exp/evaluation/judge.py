"""The one who says whether an image is fooled: the exact network, asked twice."""

import copy
import logging

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


class Judge:
    """A network in float32, frozen and in eval mode, and a second opinion on its errors.

    A winner-take-all network is discontinuous, so that rounding alone can flip a prediction. An error
    counts if it is made in float32 in the batch at hand and again in float64, or else in float32 by the
    image on its own.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._double: nn.Module | None = None
        self._has_double = True

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Logits in float32, whatever precision the run trains in."""
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.network(x)
        return logits

    @torch.no_grad()
    def errs_again(self, x: Tensor, y: Tensor) -> Tensor:
        """Which of these images, all misclassified once, are misclassified again; bool ``(N,)``."""
        again = self._errs_in_double(x, y)
        for i in (~again).nonzero()[:, 0].tolist():
            again[i] = errs(self.logits(x[i : i + 1]), y[i : i + 1])[0]
        return again

    def _errs_in_double(self, x: Tensor, y: Tensor) -> Tensor:
        if len(x) and self._has_double:
            try:
                if self._double is None:
                    self._double = copy.deepcopy(self.network).double()
                with torch.autocast(x.device.type, enabled=False):
                    return errs(self._double(x.double()), y)
            except (RuntimeError, TypeError) as error:  # somebody's network that insists on float32
                self._has_double = False
                log.info("no float64 copy of the network runs (%s); errors are confirmed one by one", error)
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)


def predicted(logits: Tensor) -> Tensor:
    """The class, or -1 where a logit is NaN: no class is predicted, and that is an error."""
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


def errs(logits: Tensor, y: Tensor) -> Tensor:
    """Which predictions are wrong, bool ``(N,)``."""
    return predicted(logits) != y
