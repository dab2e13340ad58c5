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
"""``SIMPLE_HEAD`` for terminals that know no other lines."""


def results_table(results: Mapping[str, Any], width: int | None = None) -> str:
    """``results.json`` as text: each accuracy with n and interval, the worst case, the verdict.

    "cumulative" is what an attack and all before it leave standing; "passes" are images sent forward
    or backward through the network. It fits 80 columns: long names of attacks are folded.
    """
    run, threat = results["run"], results["threat"]
    table = Table(
        title=f"{run['name']}, seed {run['seed']}: {threat['norm']} eps {threat['eps']:.4g}",
        box=SIMPLE_HEAD if _shows_lines() else _ASCII,
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
    console.print(
        f"Can this be believed? {masking['verdict'].upper()}. {masking['explanation']}",
        highlight=False,
    )
    for flag in masking["flags"]:
        sure = f" (at least {flag['lower95']:.3f})" if "lower95" in flag else ""
        console.print(
            f"  raised: {flag['check']} {flag['value']:.3f}{sure}, above {flag['threshold']:g}", highlight=False
        )
    return printable("\n".join(line.rstrip() for line in output.getvalue().split("\n")).rstrip("\n"))


def _cells(result: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    low, high = result["ci95"]
    return _percent(result[name]), f"{_bound(low)} .. {_bound(high)}", f"{result['n']:,}"


def _bound(share: float) -> str:
    return f"{100 * share:.1f}".replace("100.0", "100")


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 1000 else f"{seconds:,.0f}"


def _shows_lines() -> bool:
    """Whether the terminal's encoding has the characters that tables are drawn with."""
    try:
        "─".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
