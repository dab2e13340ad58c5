"""Run every benchmark, print one table, and write docs/performance.md where that is asked for.

    python -m benchmarks [--device cuda] [--page]

Each runs in a process of its own, one after the other, with its own defaults.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.timing import HEADER, Row

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
ON_CPU = ("op", "train", "attack", "evaluate", "startup", "shared")
ON_GPU = ("op", "train", "attack", "evaluate")


REST = """\
## What makes it fast

- **Selection** ([selection.py](../src/kwta_exp/activations/selection.py)): a row of values becomes a row of
  integer keys in the core's own cache, and the threshold is closed in on by counting, three pivots at a
  time; the first ones come from the row before, or from a sample. Exact whatever the pivots are. On CUDA a
  Triton kernel does it, by counting in registers or by histograms of digits.
- **Gradient**: one bit a value is kept, and nothing else.
- **Threads**: the work is done by torch's own OpenMP team, whose idle threads spin before they sleep and
  would keep another's from the core. A run lets them spin 8,000 turns (`GOMP_SPINCOUNT`): on the machine
  above one run alone then takes 1.10 times as long as with the default, two at once 2.25 times one alone, and
  four 4.6 times (`python -m benchmarks.shared --rounds 2`).
- **Adversarial training**: inner attacks ask for the gradient of the input alone, under the run's own
  precision (`runtime.precision=bf16-mixed runtime.channels_last=true`). `training.search=fast` shows them the
  proxy described below, brought up to date at every step. `runtime.compile=true` adds `torch.compile`,
  which is not measured here.
- **Attacks**: an image is left alone once it is fooled, and another takes its place in the batch (PGD,
  Auto-PGD, the bpda and the twin).
  `evaluation.search=fast` searches on a proxy with BatchNorm folded, channels last and in bfloat16; the
  network itself judges what comes back, and an image on which the proxy was fooled but the network was not
  is attacked again on the network.
- **Zeros** ([sparse.py](../src/kwta_exp/models/sparse.py)): what k-WTA lets through is mostly zeros, and so
  is the gradient that it lets back. On a CPU the proxy's convolutions of winners multiply what is not zero
  and nothing else, forward and backward, where at most a fifth wins: so attacking k-WTA costs less than
  attacking ReLU. On CPUs with matrix units (AMX), and on GPUs, the dense convolution is left in place.

## What it does not cost

Digits, `python run.py -m experiment=digits suite=none seed=0,1,2 runtime.precision=32-true,bf16-mixed`, 360
test images: k-WTA 0.1 98.1, 97.8 and 97.5% in float32, 98.6, 97.8 and 98.1% in bfloat16; ReLU 95.3, 98.9
and 98.1% against 98.6, 98.9 and 98.6%. Of 500 digits (those classified correctly), PGD-20 at eps 0.1 leaves
44.8% of a ReLU network with the exact search and 45.2% with the fast one, and 40.0% and 39.2% of a k-WTA
network; the bpda leaves 21.0% and 20.8% of that. A test holds the fast search, over three
networks, to within two points
([test_search.py](../tests/test_search.py)).

Digits again, adversarial training, `python run.py -m experiment=digits training=pgd
training.search=exact,fast seed=0,1,2 suite=quick runtime.threads=1`: PGD leaves 78.9, 83.9 and 80.0% of
k-WTA 0.1 trained with the exact search and 77.2, 79.2 and 79.7% trained with the fast one; the bpda, which
sees through both, 40.0, 52.5 and 51.7%, and 47.2, 53.6 and 57.2%. Seeds differ by as much.

The CUDA kernels are checked through Triton's interpreter and compiled for sm_90, but were not run on a GPU
yet, so no figure here is of one; `make bench-gpu` measures them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    asked = parser.parse_args()
    reports = [measured(name, asked.device) for name in (ON_GPU if asked.device == "cuda" else ON_CPU)]
    print("\n".join(table(reports)))
    if asked.page:
        PAGE.write_text(page(reports))
        print(f"\n{PAGE.relative_to(ROOT)} is written")


def measured(name: str, device: str) -> dict[str, Any]:
    """The report of one benchmark."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "figures.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(path)]
        command += [] if name in ("startup", "shared") else ["--device", device]
        subprocess.run(command, check=True, cwd=ROOT)
        report: dict[str, Any] = json.loads(path.read_text())
    return report | {"name": name}


def table(reports: list[dict[str, Any]]) -> list[str]:
    """Markdown, one line a figure."""
    lines = ["", f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    for report in reports:
        lines.append(f"| **{report['title']}** |{' |' * (len(HEADER) - 1)}")
        lines += [f"| {' | '.join(Row(**row).cells())} |" for row in report["rows"]]
    return lines


def page(reports: list[dict[str, Any]]) -> str:
    """``docs/performance.md``: the table, what it was measured on, and the notes."""
    rounds = ", ".join(f"{report['rounds']} ({report['name']})" for report in reports)
    head = f"""# What k-WTA costs

Made by `make bench-page`, which runs every script in [benchmarks/](../benchmarks). Each figure and its
baseline come from the same process and the same interleaved rounds, and are medians; threads and allocator
are the same on both sides. A speed-up is the baseline's time over ours, a cost is ours over the baseline's.
Absolute times belong to the machine, the ratios travel better.

Machine: {reports[0]["machine"]}. Rounds: {rounds}.
"""
    notes = [f"- {note}" for report in reports for note in report["notes"]]
    return "\n".join([head.rstrip(), *table(reports), "", *notes, "", REST])


if __name__ == "__main__":
    main()
