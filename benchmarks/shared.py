"""Several runs on one machine: the demo once, twice and four times at once.

    python -m benchmarks.shared [--rounds 3] [--json FILE]

Each run is ``python run.py`` in its own process, with its default threads, for a third of the epochs and a
sixth of the test images. The baseline of several runs is one run alone. The baseline of one run is the same
run with OpenMP's default spinning.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import Row, arguments, interleaved, report

ROOT = Path(__file__).parents[1]
DEFAULT_SPINS = {"GOMP_SPINCOUNT": "300000"}
"""The default of libgomp if there are at least as many cores as threads."""

SHORTER = ["training.epochs=10", "evaluation.n=60"]


def main() -> None:
    asked = arguments(__doc__, rounds=3)
    sides = {
        "alone": lambda: runs(1, {}),
        "alone, default spinning": lambda: runs(1, DEFAULT_SPINS),
        "2 at once": lambda: runs(2, {}),
        "4 at once": lambda: runs(4, {}),
    }
    took = interleaved(sides, asked.rounds)
    alone = took["alone"]
    rows = [
        Row("one run", alone, "the same, default spinning", took["alone, default spinning"], "s", "cost", 1.1),
        Row("2 runs at once", took["2 at once"], "one alone", alone, "s", "cost", 2.4),
        Row("4 runs at once", took["4 at once"], "one alone", alone, "s", "cost", 4.8),
    ]
    report("Sharing a machine", rows, [], asked)


def runs(count: int, variables: dict[str, str]) -> None:
    """Start ``count`` runs together and wait for all of them."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    with tempfile.TemporaryDirectory() as outputs:
        started = [
            subprocess.Popen(
                [sys.executable, "run.py", f"paths.outputs={outputs}/{number}", *SHORTER],
                cwd=ROOT, env=environment | variables, stdout=subprocess.DEVNULL,
            )
            for number in range(count)
        ]  # fmt: skip
        for process in started:
            if process.wait():
                raise RuntimeError("a run failed")


if __name__ == "__main__":
    main()
