"""What a k-WTA layer costs: ours and the published snippet, as ratios against ReLU on the same tensor.

    python benchmarks/op.py [--shape 128 64 32 32] [--ratio 0.1] [--rounds 7] [--json FILE]

Rounds are interleaved and medians reported, so that a machine whose speed drifts still compares
fairly. Absolute times belong to this machine; the ratios travel better.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kwta_exp.activations import kwta


def published(x: Tensor, ratio: float) -> Tensor:
    """k-WTA as the paper's authors published it, in outline: flatten, topk, repeat, compare, multiply."""
    size = x.shape[1] * x.shape[2] * x.shape[3]
    threshold = x.reshape(x.shape[0], -1).topk(int(ratio * size), dim=1)[0][:, -1]
    repeated = threshold.repeat(size, 1).permute(1, 0).view_as(x)
    return (x >= repeated).to(x) * x


def measure(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Seconds of one forward, and of that forward with its backward."""
    x.grad = None
    started = time.perf_counter()
    out = function(x)
    forward = time.perf_counter() - started
    out.backward(gradient)
    return forward, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=[128, 64, 32, 32], metavar=("N", "C", "H", "W"))
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    x = torch.randn(arguments.shape, requires_grad=True)
    gradient = torch.randn(arguments.shape)
    sides: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": torch.relu,
        "k-WTA": lambda x: kwta(x, arguments.ratio),
        "k-WTA as published": lambda x: published(x, arguments.ratio),
    }
    if not torch.equal(sides["k-WTA"](x), sides["k-WTA as published"](x)):
        raise SystemExit("the two k-WTA differ: nothing to compare")

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for warm in [True] + [False] * arguments.rounds:
        for name, function in sides.items():
            taken = measure(function, x, gradient)
            if not warm:
                times[name].append(taken)

    medians = {
        name: {
            "forward_ms": 1000 * statistics.median(forward for forward, _ in taken),
            "forward_backward_ms": 1000 * statistics.median(both for _, both in taken),
        }
        for name, taken in times.items()
    }
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{tuple(arguments.shape)} float32, ratio {arguments.ratio}, {arguments.rounds} rounds; {machine}")
    print(f"{'':20}{'forward':>12}{'/ relu':>9}{'fwd+bwd':>12}{'/ relu':>9}")
    for name, median in medians.items():
        forward, both = median["forward_ms"], median["forward_backward_ms"]
        base = medians["relu"]
        print(
            f"{name:20}{forward:9.1f} ms{forward / base['forward_ms']:8.1f}x"
            f"{both:9.1f} ms{both / base['forward_backward_ms']:8.1f}x"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:  # noqa: PTH123
            json.dump({"machine": machine, "medians": medians}, file, indent=2)


if __name__ == "__main__":
    main()
