"""Run every benchmark, print one table, and with --page write docs/performance.md.

    python -m benchmarks [--page]

Each benchmark runs in its own process, one after the other, with its defaults.
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
BENCHMARKS = ("op", "fresh", "train", "attack", "evaluate", "startup", "shared")


REST = """\
## What makes it fast

- **Selection** ([selection.py](../src/kwta_exp/activations/selection.py)): the first pass over a row counts the
  values above an interval around the previous row's threshold, or around a sample's, and gathers those inside;
  the second writes winners and bits. Values are compared directly, in vectors. The result is exact for any
  interval. On CUDA a Triton kernel counts short rows in registers and reads longer ones three times.
- **Memory** ([allocator.py](../src/kwta_exp/allocator.py)): a run on a CPU keeps freed memory. Otherwise the C
  library maps the output of a large layer anew at each call, which takes longer than the layer.
- **Random numbers**: one kernel for each kind of device, with the same bits.
- **Gradient**: backward saves one bit per value.
- **Threads**: the kernels run on torch's own OpenMP threads, since idle ones spin before they sleep and would
  compete with other threads for the cores. A run lets them spin 8,000 turns (`GOMP_SPINCOUNT`): on the machine
  above one run alone then takes 1.10 times as long as with the default, two at once 2.25 times one alone, and
  four 4.6 times (`python -m benchmarks.shared --rounds 2`).
- **Adversarial training**: inner attacks compute only the gradient of the input, in the precision of the run
  (`runtime.precision=bf16-mixed runtime.channels_last=true`). With `training.search=fast` they use the proxy
  described below, updated at every step. `runtime.compile=true` adds `torch.compile`, which is not measured
  here.
- **Attacks**: PGD, Auto-PGD, BPDA and the like take four batches at a time, drop the fooled images, and call
  the network in full micro-batches. `evaluation.search=fast` searches on a proxy with BatchNorm folded,
  channels last and in bfloat16. The network itself judges the result, and attacks again each image that fooled
  only the proxy.
- **Waits on a GPU**: the host queues work ahead of the device, and every value it reads makes it wait. PGD,
  Auto-PGD, BPDA and the like read one after steps 1, 2, 4, 8, 16, 24, ...: the number of images that are not
  fooled yet. Counting queries reads none. Counted for a small k-WTA network on tensors that claim to be on a
  GPU (`python -m tests.claimed`; in brackets the same at commit 7708e02):

  | a step of | operations | waits | operations, queries counted | waits |
  | --- | ---: | ---: | ---: | ---: |
  | pgd | 67 (64) | 0.12 (5.00) | 111 (106) | 0.12 (9.00) |
  | apgd | 88 (89) | 0.12 (11.25) | 132 (131) | 0.12 (15.25) |
  | bpda | 85 (82) | 0.12 (5.00) | 129 (124) | 0.12 (9.00) |
  | smoothed, 5 samples | 326 (323) | 0.12 (5.00) | 584 (571) | 0.12 (28.00) |
  | es, 20 samples, an image | 116 (116) | 1.00 (2.00) | 192 (196) | 1.00 (8.00) |
  | adversarial training, the inner attack | 27 (27) | 0.00 (0.00) | | |
  | adversarial training, all else | 85 (85) | 0.00 (1.00) | | |
- **Zeros** ([sparse.py](../src/kwta_exp/models/sparse.py)): the output of k-WTA is mostly zeros, and so is the
  gradient that it passes back. On a CPU without matrix units (AMX) the proxy's convolutions skip them, forward
  and backward, if at most a fifth of the values win, so attacking k-WTA costs less than attacking ReLU. GPUs
  and CPUs with AMX use the dense convolution.

## What it does not cost

Digits, `python run.py -m experiment=digits suite=none seed=0,1,2 runtime.precision=32-true,bf16-mixed`, 360
test images: k-WTA 0.1 98.1, 97.8 and 97.5% in float32, 98.6, 97.8 and 98.1% in bfloat16; ReLU 95.3, 98.9
and 98.1% against 98.6, 98.9 and 98.6%. Of 500 digits (those classified correctly), PGD-20 at eps 0.1 leaves
44.8% of a ReLU network with the exact search and 45.2% with the fast one, and 40.0% and 39.2% of a k-WTA
network; BPDA leaves 21.0% and 20.8% of that. A test checks on three networks that the fast search is within
two points of the exact one
([test_search.py](../tests/test_search.py)).

Digits again, adversarial training, `python run.py -m experiment=digits training=pgd
training.search=exact,fast seed=0,1,2 suite=quick runtime.threads=1`: PGD leaves 78.9, 83.9 and 80.0% of
k-WTA 0.1 trained with the exact search and 77.2, 79.2 and 79.7% trained with the fast one; BPDA leaves 40.0,
52.5 and 51.7%, and 47.2, 53.6 and 57.2%. Seeds differ by as much.

`make bench-gpu` writes docs/performance_gpu.md on a machine with a GPU.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    asked = parser.parse_args()
    reports = [measured(name) for name in BENCHMARKS]
    print("\n".join(table(reports)))
    if asked.page:
        PAGE.write_text(page(reports))
        print(f"\n{PAGE.relative_to(ROOT)} is written")


def measured(name: str) -> dict[str, Any]:
    """The report of one benchmark."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "figures.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(path)]
        subprocess.run(command, check=True, cwd=ROOT)
        report: dict[str, Any] = json.loads(path.read_text())
    return report | {"name": name}


def table(reports: list[dict[str, Any]]) -> list[str]:
    """A Markdown table with one line per figure."""
    lines = ["", f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    for report in reports:
        lines.append(f"| **{report['title']}** |{' |' * (len(HEADER) - 1)}")
        lines += [f"| {' | '.join(Row(**row).cells())} |" for row in report["rows"]]
    return lines


def page(reports: list[dict[str, Any]]) -> str:
    """The text of ``docs/performance.md``: machine, table and notes."""
    rounds = ", ".join(f"{report['rounds']} ({report['name']})" for report in reports)
    head = f"""# What k-WTA costs

Made by `make bench-page`, which runs every script in [benchmarks/](../benchmarks). Each figure and its
baseline are medians of the same interleaved rounds in one process, with the same threads and allocator. A
speed-up is the baseline's time divided by ours, a cost is ours divided by the baseline's. Ratios carry over to
other machines better than times.

Machine: {reports[0]["machine"]}. Rounds: {rounds}.
"""
    notes = [f"- {note}" for report in reports for note in report["notes"]]
    return "\n".join([head.rstrip(), *table(reports), "", *notes, "", REST])


if __name__ == "__main__":
    main()
