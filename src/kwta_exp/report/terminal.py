"""The table at the end of a run."""

import io
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD, Box
from rich.console import Console
from rich.table import Table

from kwta_exp.errors import printable

_ASCII = Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)
"""``SIMPLE_HEAD`` for terminals whose encoding has no box-drawing characters."""


def results_table(results: Mapping[str, Any], width: int | None = None) -> str:
    """``results.json`` as text: each accuracy with its interval and n, the worst case, the verdict.

    "cumulative" is the robust accuracy after this attack and all attacks before it; "passes" counts images sent
    forward or backward through the network. The table fits 80 columns; long attack names are folded.

    Args:
        results: the content of ``results.json``.
        width: in columns; ``None``: the terminal's, but at least 80.
    """
    run, threat = results["run"], results["threat"]
    table = Table(
        title=f"{run['name']}, seed {run['seed']}: {threat['norm']} eps {threat['eps']:.4g}",
        box=SIMPLE_HEAD if _encodes_box_drawing() else _ASCII,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
        title_justify="left",
        title_style="bold",
    )
    table.add_column("attack", overflow="fold")
    for heading in ("accuracy", "95% interval", "n", "cumulative", "passes", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)

    clean = results["clean"]
    table.add_row("none (clean)", *_cells(clean, "accuracy"))
    for name, attack in results["attacks"].items():
        table.add_row(
            name,
            *_cells(attack, "robust_accuracy"),
            _percent(attack["cumulative"]),
            f"{attack['forwards'] + attack['backwards']:,}",
            _seconds(attack["seconds"]),
        )
    for name in results["inapplicable"]:
        table.add_row(name, "n/a")
    if worst := results["worst_case"]:
        table.add_section()
        table.add_row("worst case", *_cells(worst, "robust_accuracy"), style="bold")

    masking = results["masking"]
    output = io.StringIO()
    console = Console(file=output, markup=False, width=width or max(shutil.get_terminal_size().columns, 80))
    console.print(table)
    console.print()
    console.print(f"Verdict: {masking['verdict'].upper()}. {masking['explanation']}", highlight=False)
    for flag in masking["flags"]:
        bound = f" (95% lower bound {flag['lower95']:.3f})" if "lower95" in flag else ""
        console.print(
            f"  {flag['check']}: {flag['value']:.3f}{bound}, threshold {flag['threshold']:g}", highlight=False
        )
    return printable("\n".join(line.rstrip() for line in output.getvalue().split("\n")).rstrip("\n"))


def _cells(result: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    low, high = result["ci95"]
    return _percent(result[name]), f"{_bound(low)} .. {_bound(high)}", f"{result['n']:,}"


def _bound(share: float) -> str:
    return f"{100 * share:.1f}".replace("100.0", "100")


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 1000 else f"{seconds:,.0f}"


def _encodes_box_drawing() -> bool:
    """Whether the terminal's encoding has the characters that tables are drawn with."""
    try:
        "─".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
