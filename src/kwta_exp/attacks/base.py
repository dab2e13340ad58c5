"""What all attacks share: a base class, and calls of the model in micro-batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from kwta_exp.attacks.losses import Loss
from kwta_exp.attacks.threat import Threat
from kwta_exp.failures import is_out_of_memory
from kwta_exp.fields import Norm

T = TypeVar("T")


class NotApplicableError(Exception):
    """Raised by an attack that does not apply to a model, with the reason. It is recorded, not scored."""


class MaxQueries(NamedTuple):
    """The largest number of forward and of backward passes that an attack may spend on one image."""

    forward: int
    backward: int


class Attack(ABC):
    """Turns images into adversarial ones.

    Attributes:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        independent: whether the result of an image depends on that image and its key alone. An evaluation then
            hands over several batches at once, so that micro-batches stay full while fooled images drop out.
        sees_single_answers: whether it sees single answers of a random network; other attacks see their mean.
    """

    norm: Norm
    eps: float
    independent: ClassVar[bool] = False
    sees_single_answers: ClassVar[bool] = False

    @property
    def threat(self) -> Threat:
        """The ball that the attack stays in."""
        return Threat(norm=self.norm, eps=self.eps)

    @abstractmethod
    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images for ``x``.

        The model's weights, gradients, buffers and mode stay as they are.

        Args:
            model: images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``, in eval mode.
            x: images in [0, 1].
            y: true labels, int64 ``(N,)``.
            keys: int64 ``(N,)``, the seed of each image's random stream (:mod:`kwta_exp.randomness`).
            max_batch_size: the most images in one call of the model; ``None`` for all. Attacks that are not
                ``independent`` may ignore it.

        Returns:
            A tensor shaped like ``x``.

        Raises:
            NotApplicableError: if the attack does not apply to the model or its images.
        """

    def max_queries(self, classes: int) -> MaxQueries | None:
        """The cost of an image that is never fooled, for the forecast; ``None`` if unknown."""
        return None

    def check_applicable(self, model: nn.Module, x: Tensor) -> None:  # noqa: B027 - most attacks apply to any
        """Raise a :class:`NotApplicableError` if the attack does not apply to ``model`` and images as ``x``."""

    def details(self, model: nn.Module, x: Tensor) -> dict[str, Any]:
        """What ``results.json`` should say of the attack beside its outcome.

        Args:
            model: what was attacked.
            x: a few of its images, in [0, 1].
        """
        return {}


class CallableAttack(Attack):
    """Any function ``(model, x, y, keys) -> x_adv``, scored in ``threat``."""

    def __init__(self, function: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor], threat: Threat) -> None:
        self.function = function
        self.norm, self.eps = threat.norm, threat.eps

    def __repr__(self) -> str:
        return f"CallableAttack({self.function!r})"

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """What the function returns; see :class:`Attack`."""
        return self.function(model, x, y, keys)


class MicroBatches:
    """Calls a model in micro-batches, which are halved whenever memory runs out.

    Args:
        model: images to logits.
        max_batch_size: the most images in one call; ``None`` for all.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], max_batch_size: int | None) -> None:
        self.model = model
        self.size = max_batch_size

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)``, without a graph."""
        return _joined(self._each(self.model, x))

    def gradient(self, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of ``loss(logits, y)`` by ``x``, the logits ``(N, K)`` and the losses ``(N,)``."""
        parts = self._each(lambda x, y: input_gradient(self.model, x, y, loss), x, y)
        gradient, logits, value = (_joined(each) for each in zip(*parts, strict=True))
        return gradient, logits, value

    def _each(self, call: Callable[..., Any], *tensors: Tensor) -> list[Any]:
        parts: list[Any] = []
        done, n = 0, len(tensors[0])
        while done < n or not parts:
            size = min(self.size or n, n - done)
            try:
                parts.append(call(*(tensor[done : done + size] for tensor in tensors)))
            except (RuntimeError, MemoryError) as error:
                if size < 2 or not is_out_of_memory(error):
                    raise
                self.size = (size + 1) // 2
                continue
            done += max(1, size)
        return parts


def with_fewer(call: Callable[[Tensor], T], x: Tensor) -> T:
    """``call`` of the first images of ``x``: half as many each time that memory runs out."""
    try:
        return call(x)
    except (RuntimeError, MemoryError) as error:
        if len(x) < 2 or not is_out_of_memory(error):
            raise
    return with_fewer(call, x[: len(x) // 2])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def input_gradient(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, loss: Loss
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of ``loss(logits, y)`` by ``x`` alone, the logits and the losses ``(N,)``, all detached.

    It is 0 where the network's outputs have no graph, such as after a detour through NumPy.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        value = loss(logits, y)
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
        gradient = torch.zeros_like(x) if gradient is None else gradient
    return gradient, logits.detach(), value.detach()


class Connected(nn.Module):
    """A network for libraries that fail on outputs without a graph: there, its gradient is 0.

    It shares the network's parameters and mode.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        """The network's logits, to the bit."""
        logits: Tensor = self.network(x)
        if torch.is_grad_enabled() and x.requires_grad and not logits.requires_grad:
            logits = _WithoutGradient.apply(x, logits)
        return logits


class _WithoutGradient(torch.autograd.Function):
    """The second argument; its gradient by the first is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor) -> Tensor:
        ctx.like = x
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(ctx.like), None


def remaining(step: int, keep: Tensor) -> Tensor | None:
    """The rows to go on with after a step, or ``None`` for all of them.

    On a CPU, images that need no more steps leave the batch after every step. Elsewhere the number of them is
    known only once the device has caught up with the host, so they leave after steps 1, 2, 4, 8, 16, 24, ...

    Args:
        step: from 0.
        keep: which images need more steps, bool ``(N,)``.

    Returns:
        Positions, int64.
    """
    done = step + 1
    if keep.device.type != "cpu" and done % 8 and done not in (1, 2, 4):
        return None
    rows = keep.nonzero()[:, 0]
    return rows if len(rows) < len(keep) else None


def compact(step: int, keep: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The :func:`remaining` rows of each tensor."""
    rows = remaining(step, keep)
    return tensors if rows is None else tuple(tensor[rows] for tensor in tensors)


forward_is_exact: ContextVar[bool] = ContextVar("forward_is_exact", default=True)
"""False while an attack changes what the network computes: no error counts then."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradient reaches the weights, for libraries that call ``backward()``."""
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in free:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in free:
            parameter.requires_grad_(True)
