"""What k-WTA costs on a GPU: every figure of docs/performance_gpu.md, with one command.

    python -m benchmarks.gpu [--minutes 10] [--page docs/performance_gpu.md] [--device cpu --small]

The rows (:mod:`benchmarks.gpu_rows`) are measured by a worker process, one after the other. An error, a crash
or a time-out is written into its row and costs no other row: after a crash, a CUDA error or a time-out a new
worker goes on with the next row. Rows for which no time is left say so. ``--small`` is for trying the command
out, on tiny shapes.
"""

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_rows import MARK, SECTIONS, Section, all_rows

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance_gpu.md"
ROW_SECONDS = 150.0
"""The longest that a row may take, with the start of its worker."""

Cells = dict[str, float | str]
Worker = Callable[[Sequence[str]], list[str]]
"""The command that measures rows, by their names."""


@dataclass
class Results:
    """What was measured: cells by row, errors by row, and the machine."""

    cells: dict[str, Cells]
    errors: dict[str, str]
    machine: str = "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all rows (default: %(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write (default: docs/...)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes: try the command, measure nothing")
    asked = parser.parse_args()

    def worker(names: Sequence[str]) -> list[str]:
        options = ["--device", asked.device, *(["--small"] if asked.small else [])]
        return [sys.executable, "-m", "benchmarks.gpu_rows", *options, "--", *names]

    started = time.monotonic()
    results = measure(list(all_rows()), worker, 60 * asked.minutes, ROW_SECONDS)
    minutes = (time.monotonic() - started) / 60
    asked.page.write_text(page(results, minutes, small=asked.small))
    print(f"{asked.page} is written; {len(results.cells)} rows measured, {len(results.errors)} not")
    if not results.cells:
        raise SystemExit(f"nothing was measured: {next(iter(results.errors.values()), 'no rows')}")


def measure(names: Sequence[str], worker: Worker, seconds: float, row_seconds: float) -> Results:
    """Measure the rows called ``names``, in workers, within ``seconds``; no row may take ``row_seconds``."""
    results, left, deadline = Results({}, {}), list(names), time.monotonic() + seconds
    while left:
        if time.monotonic() >= deadline:
            results.errors |= dict.fromkeys(left, f"not measured: the {seconds / 60:.3g} minutes were up")
            break
        before, started = len(left), False
        for message in _messages(worker(left), deadline, row_seconds):
            if "machine" in message:
                results.machine, started = message["machine"], True
                continue
            if not started:
                break
            name = left.pop(0)  # a worker measures its rows in order
            if "cells" in message:
                results.cells[name] = message["cells"]
            else:
                results.errors[name] = message["error"]
            print(f"{name}: {_said(message)}", flush=True)
        if not started or len(left) == before:  # it would go on like this for ever
            results.errors |= dict.fromkeys(left, "not measured: the worker does not start")
            break
    return results


def _messages(command: list[str], deadline: float, row_seconds: float) -> Iterator[dict[str, Any]]:
    """What a worker says, up to its end; a last error if it crashed or was stopped before its last row."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while True:
            wait = min(row_seconds, max(0.0, deadline - time.monotonic()))
            try:
                line = lines.get(timeout=wait)
            except queue.Empty:
                yield {"error": f"stopped after {wait:.0f} s"}
                return
            if line is None:
                if (status := process.wait()) != 0:
                    yield {"error": f"its process ended with status {status}"}
                return
            if line.startswith(MARK):
                message: dict[str, Any] = json.loads(line.removeprefix(MARK))
                yield message
    finally:
        process.kill()
        process.wait()
        reader.join(timeout=5)  # a grandchild may hold the pipe open
        if not reader.is_alive() and process.stdout is not None:
            process.stdout.close()


def page(results: Results, minutes: float, small: bool = False) -> str:
    """The page's text."""
    lines = [
        "# What k-WTA costs on a GPU",
        "",
        "Made by `make bench-gpu` ([gpu_rows.py](../benchmarks/gpu_rows.py) measures). Times are medians of"
        " interleaved rounds in one process; a ratio compares two sides of the same rounds. On a GPU the host"
        " queues work ahead, so times are taken over bursts of calls; `GPU alone` replays the same call from a"
        " CUDA graph, without the host.",
        "",
        f"Machine: {results.machine}. The page took {minutes:.1f} minutes.",
    ]
    if small:
        lines += ["", "**Made with --small: tiny shapes that show only that the command works.**"]
    for section in SECTIONS:
        lines += ["", f"## {section.title}", "", section.about, "", *_table(section, results)]
    return "\n".join(lines) + "\n"


def _table(section: Section, results: Results) -> list[str]:
    lines = ["| " + " | ".join(["what", *section.columns]) + " |", "|" + " --- |" * (1 + len(section.columns))]
    for name in section.rows:
        if name in results.cells:
            found = results.cells[name]
            cells = [_cell(found.get(column, "")) for column in section.columns]
        else:
            cells = [results.errors.get(name, "not measured").replace("|", "/").replace("\n", " ")]
            cells += [""] * (len(section.columns) - 1)
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def _said(message: dict[str, Any]) -> str:
    if "error" in message:
        return str(message["error"])
    return ", ".join(f"{column} {_cell(value)}" for column, value in message["cells"].items() if value != "")


def _cell(value: float | str) -> str:
    if isinstance(value, str):
        return value.replace("|", "/")
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main()
