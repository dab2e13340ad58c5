"""What an attack is, to whoever calls one."""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn


class NotApplicableError(Exception):
    """Raised by an attack that has no hold on a model; says why. It is recorded, not scored."""


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
        """
        ...
