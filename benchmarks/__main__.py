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
SECTIONS = "## What makes it fast"
"""Where the page goes on with text that is written by hand."""
BENCHMARKS = ("op", "fresh", "train", "attack", "evaluate", "startup", "shared")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    asked = parser.parse_args()
    reports = [measured(name) for name in BENCHMARKS]
    print("\n".join(table(reports)))
    if asked.page:
        PAGE.write_text(page(reports, PAGE.read_text()))
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


def page(reports: list[dict[str, Any]], before: str) -> str:
    """The text of ``docs/performance.md``: machine, table and notes are new, sections stay as ``before``."""
    rounds = ", ".join(f"{report['rounds']} ({report['name']})" for report in reports)
    head = f"""# What k-WTA costs

Made by `make bench-page`, which runs every script in [benchmarks/](../benchmarks). Each figure and its
baseline are medians of the same interleaved rounds in one process, with the same threads and allocator. A
speed-up is the baseline's time divided by ours, a cost is ours divided by the baseline's. Ratios carry over to
other machines better than times.

Machine: {reports[0]["machine"]}. Rounds: {rounds}.
"""
    notes = [f"- {note}" for report in reports for note in report["notes"]]
    return "\n".join([head.rstrip(), *table(reports), "", *notes, "", before[before.index(SECTIONS) :]])


if __name__ == "__main__":
    main()
