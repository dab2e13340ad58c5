"""A curve through a few points, fitted by a network with one input: what it looks like between them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kwta_exp.analysis.pieces import Patterns, Pieces, along, pieces
from kwta_exp.models import MLP
from kwta_exp.models.factory import ActivationFactory

DOMAIN = -3.0, 3.0
"""Where the curve is drawn."""


@dataclass(frozen=True)
class Fit:
    """A fitted network.

    Attributes:
        x: positions on :data:`DOMAIN` at which it was evaluated, ``(M,)``.
        y: its values there.
        at_points: its values at the points it was trained on.
        error: root of the mean squared error at those points.
        pieces: its pieces on :data:`DOMAIN`.
    """

    x: Tensor
    y: Tensor
    at_points: Tensor
    error: float
    pieces: Pieces


def curve(x: Tensor) -> Tensor:
    """The curve to fit, on [-3, 3]: a sine that fades."""
    return torch.exp(-x.square() / 8) * torch.sin(2 * x)


def points(n: int) -> tuple[Tensor, Tensor]:
    """``n`` points of the :func:`curve`, at equal distances over :data:`DOMAIN`."""
    x = torch.linspace(*DOMAIN, n, dtype=torch.float64)
    return x, curve(x)


def fit(activation: ActivationFactory, n: int, hidden: list[int], steps: int, seed: int) -> Fit:
    """Fit a network to ``n`` points by the mean squared error, with Adam on all points at once, in float64.

    Args:
        activation: makes the activation of each hidden layer.
        n: number of points.
        hidden: widths of the hidden layers.
        steps: of Adam; the learning rate falls from 0.003 to 0 along a cosine.
        seed: of the initial weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MLP(activation, hidden, num_classes=1, in_channels=1, image_size=(1, 1)).double()
    x, y = points(n)
    inputs, targets = x.view(-1, 1, 1, 1), y[:, None]
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(inputs), targets).backward()
        optimizer.step()
        schedule.step()

    patterns = Patterns(network)
    found = pieces(along(patterns, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), None), *DOMAIN)
    fine = torch.linspace(*DOMAIN, 4001, dtype=torch.float64)
    fitted, at_points = (patterns.at(part.view(-1, 1, 1, 1))[0][:, 0] for part in (fine, x))
    return Fit(fine, fitted, at_points, float((at_points - y).square().mean().sqrt()), found)
