"""The base classes of the training methods."""

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
from kwta_exp.models.proxy import updated_proxy

Search = Literal["exact", "fast"]


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Training(ABC):
    """A training method, and how long it trains.

    Args:
        epochs: passes over the training images.
        batch_size: images in a step.
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
        """The :meth:`loss` of each optimizer step on this batch. The caller computes the gradients of each and
        takes the step before it asks for the next.

        Args:
            model: in train mode.
            batch: images, labels and keys.
            memory: tensors that the method carries from batch to batch; they are part of the training state.
        """
        yield self.loss(model, batch)

    def robustly_correct(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Which images ``(N,)`` are classified correctly under the method's attack; ``None`` if it has none.

        Called with ``model`` in eval mode. The best epoch is the one where this is highest.
        """
        return None

    def warning(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """A warning about the last epoch, if it shows a failure that this method is known for."""
        return None

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean cross-entropy, with the method's label smoothing."""
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class AdversarialTraining(Training):
    """A method that attacks its training images and is validated on attacked images.

    Args:
        attack: the inner maximisation, with its own norm, eps and steps.
        search: ``"fast"`` runs the attack on a proxy of the network with its current weights
            (:class:`~kwta_exp.models.proxy.Proxy`), equal up to rounding; ``"exact"`` runs it on the network.
            The loss and the validation use the network itself in both cases.
    """

    attack: SkipValidation[Attack]
    search: Search = "exact"

    def attacked(self, model: nn.Module, batch: Batch) -> Tensor:
        """The adversarial images; as in the k-WTA study, the attack sees the network in eval mode."""
        return search(self.attack, model, batch, self.search)

    def robustly_correct(self, model: nn.Module, batch: Batch) -> Tensor:
        return correct_under_attack(self.attack, model, batch, self.search)


def search(attack: Attack, model: nn.Module, batch: Batch, how: Search) -> Tensor:
    """Adversarial images made on the network in eval mode, or on its proxy."""
    network = unwrapped(model)
    with eval_mode(network):
        attacked = updated_proxy(network, batch.x[:2]) if how == "fast" else network
        return attack(attacked, batch.x, batch.y, batch.keys)


def correct_under_attack(attack: Attack, model: nn.Module, batch: Batch, how: Search = "exact") -> Tensor:
    """Which images ``(N,)`` the network classifies correctly in eval mode after ``attack``."""
    x_adv = search(attack, model, batch, how)
    network = unwrapped(model)
    with eval_mode(network):
        return correct(network(x_adv), batch.y)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """BatchNorm uses its running statistics and dropout is off; each module's mode is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def unwrapped(model: nn.Module) -> nn.Module:
    """The network without Fabric's wrapper, whose forward also synchronises processes."""
    from lightning_fabric.wrappers import is_wrapped

    return model.module if is_wrapped(model) else model  # type: ignore[return-value]


def correct(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """Which predictions are correct, bool ``(N,)``; never where a logit is NaN."""
    return (logits_NK.argmax(1) == y_N) & ~torch.isnan(logits_NK).any(1)
