"""Report of many runs: how long its page takes, with and without the pages of its runs, and how large it is.

    python -m benchmarks.report [--runs 200] [--images 1000] [--epochs 30]

The runs are made up: k-WTA at ratios and seeds, each with an evaluation by three attacks and training curves.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from tests import stored

from kwta_exp.cli import main as kwta_exp
from kwta_exp.storage import write_lines

ATTACKS = {"fgsm": 0.3, "pgd": 0.6, "bpda": 0.8}
"""Attacks, and the share of images that each fools."""

CLASSES = 10
SEEDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--images", type=int, default=1000, help="of an evaluation")
    parser.add_argument("--epochs", type=int, default=30)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder)
        for number in range(asked.runs):
            make(outputs, number, asked.images, asked.epochs)
        for what in ("and the pages of its runs", "alone"):
            start = time.perf_counter()
            kwta_exp(["report", folder])
            print(f"the page of {asked.runs} runs {what}: {time.perf_counter() - start:.1f} s")
        sizes = [path.stat().st_size for path in outputs.glob("*/*/report.html")]
        whole = (outputs / "report.html").stat().st_size
    print(f"its size: {whole / 1e6:.2f} MB; of a run's page: {max(sizes) / 1e6:.2f} MB at most")


def make(outputs: Path, number: int, images: int, epochs: int) -> None:
    """Write a run folder: its configuration, training curves and an evaluation."""
    rng = np.random.default_rng(number)
    ratio, seed = (1 + number // SEEDS) / 100, number % SEEDS
    run = outputs / f"d-m-kwta{ratio:g}-natural" / f"s{seed}-0123456789"
    stored.described(run, "kwta", seed, ratio=ratio)
    correct = rng.random(images) < 0.95
    attacked = int(correct.sum())
    columns = {"clean": {"label": rng.integers(0, CLASSES, images)}}
    for attack in ATTACKS:
        passes = rng.integers(1, 400, (2, attacked))
        columns[attack] = {
            "queries": passes[0], "steps": passes[1], "prediction": rng.integers(0, CLASSES, attacked),
        }  # fmt: skip
    fooled = {attack: np.flatnonzero(rng.random(images) < share) for attack, share in ATTACKS.items()}
    stored.evaluation(run, "quick-x", correct.tolist(), fooled, columns=columns, seed=seed)
    shares = 1 - 0.9 * np.exp(-np.arange(1, epochs + 1) / 5)
    history = [
        {"epoch": epoch, "loss": float(3 - 2.5 * share), "accuracy": float(share), "val_accuracy": float(share)}
        for epoch, share in enumerate(shares, 1)
    ]
    write_lines(run / "metrics.jsonl", history)


if __name__ == "__main__":
    main()
