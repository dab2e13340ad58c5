"""Whether the cost of k-WTA varies from process to process: its forward pass against ReLU's, in new processes.

    python -m benchmarks.fresh [--ratio 0.1] [--rounds 25] [--processes 10] [--json FILE]

Each process times both sides in interleaved rounds at both batch sizes, and keeps freed memory as a run does
(:mod:`kwta_exp.allocator`). A large output is written past the caches, so a second pair of sides multiplies it
by 2, which reads it again.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.op import SHAPE
from benchmarks.timing import Row, arguments, interleaved, report
from kwta_exp.activations import kwta

ROOT = Path(__file__).parents[1]


def main() -> None:
    asked = arguments(__doc__, rounds=25, ratio=0.1, processes=10, child=0)
    if asked.child:
        print(json.dumps([milliseconds(batch, asked.ratio, asked.rounds) for batch in BATCHES]))
        return
    command = [sys.executable, "-m", "benchmarks.fresh", "--child", "1"]
    command += ["--ratio", str(asked.ratio), "--rounds", str(asked.rounds)]
    taken = []
    for _ in range(asked.processes):
        run = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        taken.append(json.loads(run.stdout))
    rows, notes = [], []
    for place, batch in enumerate(BATCHES):
        ours, relu = ([process[place][side] for process in taken] for side in ("k-WTA", "ReLU"))
        what = f"forward, float32, batch {batch}"
        ratios = sorted(a / b for a, b in zip(ours, relu, strict=True))
        middle = sorted(zip(ours, relu, strict=True), key=lambda pair: pair[0] / pair[1])[len(taken) // 2]
        rows.append(Row(f"{what}, the process of median ratio", *_against(middle, "ReLU"), "ms", "cost", 1.5))
        times, costs = (max(ours), min(ours)), (ratios[-1], ratios[0])
        rows.append(Row(f"{what}, the slowest process", *_against(times, "the fastest"), "ms", "cost", 1.3))
        rows.append(Row(f"{what}, the largest ratio", *_against(costs, "the smallest"), "x", "cost", 1.3))
        each = ", ".join(f"{time:.2f}" for time in ours)
        notes.append(
            f"- Batch {batch}, medians of k-WTA: {each} ms; against ReLU {ratios[0]:.2f} to {ratios[-1]:.2f}."
        )
        ours, relu = ([process[place][f"{side} and a read"] for process in taken] for side in ("k-WTA", "ReLU"))
        pair = sorted(zip(ours, relu, strict=True), key=lambda pair: pair[0] / pair[1])[len(taken) // 2]
        rows.append(Row(f"{what}, and a pass over the output", *_against(pair, "ReLU, and one"), "ms", "cost"))
    report(f"k-WTA {asked.ratio:g} on {SHAPE} and half of it, {asked.processes} processes", rows, notes, asked)


BATCHES = (SHAPE[0], SHAPE[0] // 2)


def _against(pair: tuple[float, float], baseline: str) -> tuple[float, str, float]:
    return pair[0], baseline, pair[1]


def milliseconds(batch: int, ratio: float, rounds: int) -> dict[str, float]:
    """The median time of each side in this process."""
    x = torch.randn(batch, *SHAPE[1:], generator=torch.Generator().manual_seed(0))
    sides: dict[str, Callable[[], Tensor]] = {
        "k-WTA": lambda: kwta(x, ratio),
        "ReLU": lambda: torch.relu(x),
        "k-WTA and a read": lambda: kwta(x, ratio) * 2,
        "ReLU and a read": lambda: torch.relu(x) * 2,
    }
    times = interleaved(sides, rounds, warm=5)
    return {name: 1000 * time for name, time in times.items()}


if __name__ == "__main__":
    main()
