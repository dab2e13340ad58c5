"""What every training method has in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import dataclasses
from torch import Tensor, nn

from kwta_exp.data.batches import Batch
from kwta_exp.fields import STRICT, Count


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Training(ABC):
    """A training method and its length.

    Args:
        epochs: passes over the training images.
        batch_size: images of a step.
    """

    epochs: Count
    batch_size: Count = 128

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The scalar to minimise and the logits ``(N, K)`` it was computed from.

        Called with ``model`` in train mode, under the run's autocast.
        """

    def robustly_correct(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Which images ``(N,)`` survive this method's own attack; ``None`` if it has none.

        Called with ``model`` in eval mode. The best epoch is chosen by it where it exists.
        """
        return None


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """BatchNorm frozen at its running statistics, dropout off; every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, without Fabric's wrapper, whose forward also synchronises processes."""
    from lightning_fabric.wrappers import is_wrapped

    return model.module if is_wrapped(model) else model  # type: ignore[return-value]


def correct(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """Which predictions are right, bool ``(N,)``; a NaN logit is never right."""
    return (logits_NK.argmax(1) == y_N) & ~torch.isnan(logits_NK).any(1)
