"""The loss of a network over a plane through images: the gradient's direction and a random one.

As in the study's figure of loss landscapes (Xiao et al. 2020, arXiv 1905.10510): the loss of a ReLU network is
smooth, that of a k-WTA network is jagged. So a gradient of k-WTA says little of the loss a step away. It does
not follow that there are no adversarial images.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kwta_exp.progress import Progress
from kwta_exp.randomness import fold, key, uniform


@dataclass(frozen=True)
class Landscape:
    """The loss over a plane.

    Attributes:
        steps: along both axes, in pixel units of the L-inf norm, ``(P,)``.
        loss: the mean cross-entropy of the images, in nats, at ``[random step, gradient step]``, ``(P, P)``.
        n: images.
    """

    steps: Tensor
    loss: Tensor
    n: int


@torch.no_grad()
def landscape(
    network: nn.Module, x_NCHW: Tensor, y_N: Tensor, extent: float, points: int, *, seed: int, batch: int = 256
) -> Landscape:
    """The loss at ``x + a * sign(gradient) + b * signs``, where ``signs`` are random and of each image's own.

    Values outside [0, 1] are not clipped: the plane is flat everywhere, and shows the network alone.

    Args:
        network: in evaluation mode; returns logits.
        x_NCHW: images in [0, 1].
        y_N: their labels; the loss is that of these classes.
        extent: ``a`` and ``b`` go from ``-extent`` to ``extent``, in pixel units.
        points: along each axis; odd, so that the image itself is one of them.
        seed: of the random directions, which are the same for every network.
        batch: images that go through the network at once.
    """
    with torch.enable_grad():
        leaf = x_NCHW.clone().requires_grad_()
        loss = nn.functional.cross_entropy(network(leaf), y_N, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
    keys = fold(key(seed, "landscape"), torch.arange(len(x_NCHW), device=x_NCHW.device))
    signs = torch.where(uniform(keys, x_NCHW.shape[1:]) < 0.5, -1.0, 1.0)
    steps = torch.linspace(-extent, extent, points, device=x_NCHW.device)
    total = torch.zeros(points * points, dtype=torch.float64, device=x_NCHW.device)
    places = torch.cartesian_prod(steps, steps)  # (random, gradient)
    with Progress("loss landscape", len(x_NCHW) * len(places), "images") as progress:
        for image, direction, other, label in zip(x_NCHW, gradient.sign(), signs, y_N, strict=True):
            for begin in range(0, len(places), batch):
                random, along = places[begin : begin + batch].view(-1, 2, 1, 1, 1).unbind(1)
                logits = network(image + along * direction + random * other)
                losses = nn.functional.cross_entropy(logits, label.expand(len(logits)), reduction="none")
                total[begin : begin + len(losses)] += losses
                progress.advance(len(losses))
    return Landscape(steps.cpu(), (total / len(x_NCHW)).view(points, points).cpu(), len(x_NCHW))


def roughness(found: Landscape) -> float:
    """How jagged a landscape is along the gradient's direction.

    The mean size of its second difference, as a share of the range of its losses: 0 for a plane, and for a
    smooth surface in proportion to the square of the distance of its points.
    """
    second = found.loss.diff(n=2, dim=1).abs().mean()
    span = found.loss.amax() - found.loss.amin()
    return float(second / span) if span > 0 and math.isfinite(span) else math.nan
