"""Training in two processes of one thread (DDP over gloo) against one process of two threads, on a CPU.

    python -m benchmarks.ddp [--rounds 3] [--json FILE]

Each side is ``python run.py`` with the demo's network on digits, naturally and adversarially trained. The time
of an image is that of the epochs after the first, from ``metrics.jsonl``: starting the processes is not in it.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import Row, arguments, report

ROOT = Path(__file__).parents[1]
ONE = ["runtime=cpu", "runtime.threads=2"]
TWO = ["runtime=ddp", "runtime.accelerator=cpu", "runtime.devices=2", "runtime.threads=1"]
TRAININGS = {"natural": 12, "pgd": 4}
"""Epochs of each."""


def main() -> None:
    asked = arguments(__doc__, rounds=3)
    rows = []
    for training, epochs in TRAININGS.items():
        took: dict[str, list[float]] = {"one": [], "two": []}
        for _ in range(asked.rounds):
            for side, overrides in (("one", ONE), ("two", TWO)):
                took[side].append(milliseconds_an_image(training, epochs, overrides))
        one, two = (statistics.median(took[side]) for side in ("one", "two"))
        rows.append(
            Row(f"{training}, 2 processes x 1 thread", two, "1 process x 2 threads", one, "ms", "speed-up")
        )
    report("One run in two processes: an image in training", rows, [], asked)


def milliseconds_an_image(training: str, epochs: int, overrides: list[str]) -> float:
    """The median time of an image in training."""
    with tempfile.TemporaryDirectory() as outputs:
        given = [f"training={training}", f"training.epochs={epochs}", "suite=none", *overrides]
        subprocess.run(
            [sys.executable, "run.py", *given, f"paths.outputs={outputs}"],
            cwd=ROOT, stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        (metrics,) = Path(outputs).glob("*/*/metrics.jsonl")
        speeds = [json.loads(line)["images_per_second"] for line in metrics.read_text().splitlines()]
    return 1000 / statistics.median(speeds[1:])


if __name__ == "__main__":
    main()
