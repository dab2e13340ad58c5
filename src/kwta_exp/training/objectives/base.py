"""What every training method has in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, SkipValidation, dataclasses
from torch import Tensor, nn

from kwta_exp.attacks import Attack
from kwta_exp.data.batches import Batch
from kwta_exp.fields import STRICT, Rate, Share
from kwta_exp.models.proxy import following

Search = Literal["exact", "fast"]


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Training(ABC):
    """A training method and its length.

    Args:
        epochs: passes over the training images.
        batch_size: images of a step.
        label_smoothing: share of the target spread over all classes in the cross-entropies of the method,
            in [0, 1) (Szegedy et al. 2016, section 7).
        clip_norm: gradients of all parameters together are scaled down to this L2 norm at most; ``None``
            leaves them.
        ema_decay: validate and keep an exponential moving average of the weights, updated after every
            step with this decay in (0, 1) (``torch.optim.swa_utils``; 0.995 is usual); ``None`` keeps the
            weights themselves.
    """

    epochs: PositiveInt
    batch_size: PositiveInt = 128
    label_smoothing: Rate = 0.0
    clip_norm: PositiveFloat | None = None
    ema_decay: Share | None = None

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The scalar to minimise and the logits ``(N, K)`` it was computed from.

        Called with ``model`` in train mode, under the run's autocast.
        """

    def losses(
        self, model: nn.Module, batch: Batch, memory: dict[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One :meth:`loss` for each step to take on this batch; after each, the gradients are there.

        Args:
            model: in train mode.
            batch: images, labels and keys.
            memory: tensors that the method carries from batch to batch; they are saved with the training.
        """
        yield self.loss(model, batch)

    def robustly_correct(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Which images ``(N,)`` survive this method's own attack; ``None`` if it has none.

        Called with ``model`` in eval mode. The best epoch is chosen by it where it exists.
        """
        return None

    def warning(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """What went wrong in the last epoch, if it is of a kind that the method is known for."""
        return None

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean cross-entropy, with the method's label smoothing."""
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class AdversarialTraining(Training):
    """A method that attacks its training images, and is judged on attacked validation images.

    Args:
        attack: the inner maximiser, with its own norm, eps and steps. Any object of this project's attack
            interface will do.
        search: ``"fast"`` lets it see a proxy of the network as it is at that moment
            (:class:`~kwta_exp.models.proxy.Proxy`), the same up to rounding; ``"exact"`` the network. What
            is learned from, and judged, is the network's answer either way.
    """

    attack: SkipValidation[Attack]
    search: Search = "exact"

    def attacked(self, model: nn.Module, batch: Batch) -> Tensor:
        """What ``attack`` makes of the images, seeing the network in eval mode as in the k-WTA study."""
        return search(self.attack, model, batch, self.search)

    def robustly_correct(self, model: nn.Module, batch: Batch) -> Tensor:
        return withstands(self.attack, model, batch, self.search)


def search(attack: Attack, model: nn.Module, batch: Batch, how: Search) -> Tensor:
    """What ``attack`` makes of the images, on the network in eval mode or on its proxy."""
    network = unwrapped(model)
    with eval_mode(network):
        searched = following(network, batch.x[:2]) if how == "fast" else network
        return attack(searched, batch.x, batch.y, batch.keys)


def withstands(attack: Attack, model: nn.Module, batch: Batch, how: Search = "exact") -> Tensor:
    """Which images ``(N,)`` are classified correctly after ``attack``, the network in eval mode."""
    x_adv = search(attack, model, batch, how)
    network = unwrapped(model)
    with eval_mode(network):
        return correct(network(x_adv), batch.y)


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
