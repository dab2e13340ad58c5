"""What an attack is, to whoever calls one."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


class NotApplicableError(Exception):
    """Raised by an attack that has no hold on a model; says why. It is recorded, not scored."""


answers_are_exact: ContextVar[bool] = ContextVar("answers_are_exact", default=True)
"""Off while an attack has the network answer with something else than its own outputs: no error counts then."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """For code of others that calls ``backward()``: no gradient reaches the weights."""
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in free:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in free:
            parameter.requires_grad_(True)


@runtime_checkable
class Attack(Protocol):
    """Anything that turns images into adversarial ones.

    A caller hands over the model in eval mode. An attack changes neither its weights, their
    gradients, its buffers nor its mode.
    """

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """Adversarial images for ``x``.

        Args:
            model: images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``.
            x: float32 images in [0, 1].
            y: true labels, int64 ``(N,)``.
            keys: int64 ``(N,)``, the seed of each image's own random stream
                (:mod:`kwta_exp.randomness`).

        Returns:
            A tensor shaped like ``x``.

        An attack may also have ``refills = True``: then it is given more images than a batch holds and, as the
        keyword ``max_batch_size``, how many the model may be shown at a time. And ``passes(classes) ->
        (forward, backward)``, the most passes it takes for an image of so many classes that withstands, for the
        forecast; and ``details(model)``, what it wishes to say in ``results.json``.
        """
        ...
