"""The threat model: the perturbations of an image that an attack may use."""

import math
from collections.abc import Sequence

import torch
from pydantic import ValidationInfo, dataclasses, field_validator
from torch import Tensor

from kwta_exp.fields import STRICT, Eps, Norm
from kwta_exp.randomness import normal, uniform


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Threat:
    """A ball of radius ``eps`` around an image, intersected with the pixel range [0, 1].

    Args:
        norm: ``"linf"`` or ``"l2"``, over all C*H*W values of an image.
        eps: radius in pixel units of [0, 1]; under L-inf at most 1.
    """

    norm: Norm
    eps: Eps

    @field_validator("eps")
    @classmethod
    def _bounded(cls, eps: float, info: ValidationInfo) -> float:
        check_radius(info.data.get("norm", ""), eps)
        return eps

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Project images onto the ball, then clip them to [0, 1].

        Under L-inf the result is the nearest allowed image. Clipping never leaves the ball: it moves each pixel
        towards ``x``.
        """
        if self.norm == "linf":
            return torch.minimum(torch.maximum(x_adv, x - self.eps), x + self.eps).clamp_(0, 1)
        return (x + self.bound(x_adv - x)).clamp_(0, 1)

    def bound(self, delta: Tensor) -> Tensor:
        """Project perturbations onto the ball of radius ``eps``, without regard to the pixel range."""
        if self.norm == "linf":
            return delta.clamp(-self.eps, self.eps)
        return delta * (self.eps / _l2(delta).clamp_min(1e-12)).clamp_max(1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The unit-norm direction of steepest ascent; 0 where the gradient is 0 or NaN."""
        gradient = gradient.nan_to_num(0.0)
        if self.norm == "linf":
            return gradient.sign()
        # Scaled twice, because the squares of a confident network's gradients underflow.
        gradient = gradient / gradient.abs().amax(tuple(range(1, gradient.dim())), keepdim=True).clamp_min(
            torch.finfo(gradient.dtype).tiny
        )
        return gradient / _l2(gradient).clamp_min(0.5)

    def random_point(self, x: Tensor, keys: Tensor) -> Tensor:
        """A point drawn uniformly from the ball around each image, clipped to [0, 1]."""
        shape = x.shape[1:]
        if self.norm == "linf":
            return (x + (2 * uniform(keys, shape) - 1) * self.eps).clamp_(0, 1)
        direction = self.steepest(normal(keys, shape))
        # Another stream of the same key: its first draws belong to the direction.
        radius: Tensor = uniform(~keys, (1, 1, 1)) ** (1 / shape.numel())
        return torch.clamp(x + direction * radius * self.eps, 0, 1)

    def random_edge_point(self, x: Tensor, keys: Tensor) -> Tensor:
        """A random corner of the ball (L-inf) or point of the sphere (L2) around each image, clipped to [0, 1].

        One image may be combined with many keys: ``x`` broadcasts.
        """
        return self.project(x + self.eps * self.steepest(uniform(keys, x.shape[1:]) - 0.5), x)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The norm of each image's perturbation, ``(N,)``."""
        order = math.inf if self.norm == "linf" else 2
        distance: Tensor = torch.linalg.vector_norm((x_adv - x).flatten(1), ord=order, dim=1)
        return distance


def check_radius(norm: str, eps: float, shape: Sequence[int] | None = None) -> None:
    """Reject a radius so large that the ball holds every image, such as one in units of 1/255.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: the radius.
        shape: (channels, height, width) of the images, which bounds an L2 radius.

    Raises:
        ValueError: with the largest radius that makes sense.
    """
    if norm == "linf" and eps > 1:
        hint = f"{eps:g}/255" if eps <= 255 else "8/255"
        raise ValueError(f"pixels lie in [0, 1]; expected an L-inf radius of at most 1, such as {hint}")
    if norm == "l2" and shape is not None and eps > (diameter := math.sqrt(math.prod(shape))):
        raise ValueError(
            f"pixels lie in [0, 1]; expected an L2 radius of at most {diameter:.4g}, the largest distance"
            f" between two images of shape {tuple(shape)}"
        )


def _l2(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)
    return norms
