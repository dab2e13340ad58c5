"""Interleaved rounds, medians, and comparisons with a baseline."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kwta_exp.allocator import keep_freed_memory
from kwta_exp.environment import processor
from kwta_exp.runtime import compute_in_float32

Sides = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """A figure and its baseline, in the same unit and from the same rounds.

    Args:
        what: what was measured.
        ours: our median.
        baseline: what it is compared with.
        theirs: the baseline's median.
        unit: the unit of both.
        kind: ``"speed-up"``: the ratio is theirs / ours; ``"cost"``: ours / theirs.
        wanted: the goal, a smallest speed-up or a largest cost; ``None`` for a figure without one.
    """

    what: str
    ours: float
    baseline: str
    theirs: float
    unit: str
    kind: Literal["speed-up", "cost"]
    wanted: float | None = None

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours if self.kind == "speed-up" else self.ours / self.theirs

    @property
    def met(self) -> bool | None:
        if self.wanted is None:
            return None
        return self.ratio >= self.wanted if self.kind == "speed-up" else self.ratio <= self.wanted

    def cells(self) -> tuple[str, ...]:
        wanted = "" if self.wanted is None else f"{'≥' if self.kind == 'speed-up' else '≤'} {self.wanted:g}"
        met = {None: "", True: "yes", False: "NO"}[self.met]
        return (
            self.what,
            f"{self.ours:,.4g} {self.unit}",
            self.baseline,
            f"{self.theirs:,.4g} {self.unit}",
            f"{self.ratio:.2f}x",
            wanted,
            met,
        )


HEADER = ("what", "ours", "baseline", "baseline's", "ratio", "wanted", "met")


def interleaved(sides: Sides, rounds: int, warm: int = 1, device: str = "cpu") -> dict[str, float]:
    """The median seconds of each side in ``rounds`` rounds, after ``warm`` rounds to warm up.

    Each round runs every side once, so a drift of the machine's speed affects all sides alike.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm + rounds):
        for name, side in sides.items():
            _wait(device)
            started = time.perf_counter()
            side()
            _wait(device)
            if number >= warm:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def arguments(description: str | None, rounds: int, **more: Any) -> argparse.Namespace:
    """Parse the options of every benchmark, and those in ``more`` (name to default).

    Sets precision and allocator as a run does (:meth:`kwta_exp.runtime.Runtime.launch`).
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    compute_in_float32()
    keep_freed_memory()
    return parser.parse_args()


def report(title: str, rows: list[Row], notes: list[str], asked: argparse.Namespace) -> None:
    """Print a table, and with --json write it to a file."""
    table = [HEADER, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"\n{title}; {asked.rounds} rounds; {machine()}")
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for note in notes:
        print(note)
    if asked.json:
        content = {
            "title": title,
            "machine": machine(),
            "rounds": asked.rounds,
            "rows": [asdict(row) for row in rows],
            "notes": notes,
        }
        asked.json.write_text(json.dumps(content, indent=2) + "\n")


def machine(device: str = "cpu") -> str:
    """Processor or GPU, threads, memory, torch's version and the precision of float32, in one line."""
    tf32 = "TF32 on" if torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32 else "TF32 off"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {tf32}"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{processor()}, {torch.get_num_threads()} threads, {memory:.0f} GiB, torch {torch.__version__}"
