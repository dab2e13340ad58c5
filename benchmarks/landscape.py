"""A loss landscape of ResNet-18: points an image at once, against all images one point at a time.

    python -m benchmarks.landscape [--rounds 3] [--images 4] [--points 7] [--json FILE]

``--images 64 --points 41 --rounds 1`` is a whole figure (20 minutes on two cores). The networks have random
weights, since time does not depend on them.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.timing import Row, arguments, interleaved, report
from kwta_exp.activations import KWTA
from kwta_exp.analysis.landscape import landscape
from kwta_exp.models import ResNet

EXTENT = 16 / 255


def main() -> None:
    asked = arguments(__doc__, rounds=3, images=4, points=7)
    rows: list[Row] = []
    notes: list[str] = []
    x = torch.rand(asked.images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.arange(asked.images) % 10
    total = asked.images * asked.points**2
    for name, activation in {"ReLU": nn.ReLU, "k-WTA 0.1": partial(KWTA, ratio=0.1)}.items():
        torch.manual_seed(0)
        network = (
            ResNet(depth=18, activation=activation, num_classes=10, in_channels=3).eval().requires_grad_(False)
        )
        sides: dict[str, Callable[[], object]] = {
            "ours": partial(landscape, network, x, y, EXTENT, asked.points, seed=0),
            "loop": partial(point_by_point, network, x, y, asked.points),
        }
        seconds = interleaved(sides, asked.rounds)
        what = f"{asked.points} x {asked.points} points, {asked.images} images, {name}"
        rows.append(Row(what, seconds["ours"], "a loop over points", seconds["loop"], "s", "speed-up"))
        notes.append(f"{name}: {total / seconds['ours']:,.0f} images/s")
    report("Loss landscape of ResNet-18", rows, notes, asked)


@torch.no_grad()
def point_by_point(network: nn.Module, x: Tensor, y: Tensor, points: int) -> Tensor:
    """What one writes first: a forward pass of all images for each point."""
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(network(leaf), y), leaf)
    signs = torch.randn_like(x).sign()
    steps = torch.linspace(-EXTENT, EXTENT, points)
    return torch.stack(
        [
            nn.functional.cross_entropy(network(x + a * gradient.sign() + b * signs), y)
            for a in steps
            for b in steps
        ]
    )


if __name__ == "__main__":
    main()
