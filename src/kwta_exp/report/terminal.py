"""The table at the end of a run."""

import io
import shutil
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kwta_exp.errors import printable


def results_table(results: Mapping[str, Any], width: int | None = None) -> str:
    """``results.json`` as text: each accuracy with n and interval, the worst case, the verdict.

    "cumulative" is what an attack and all before it leave standing; "passes" are images sent forward
    or backward through the network.
    """
    run, threat = results["run"], results["threat"]
    table = Table(
        title=f"{run['name']}, seed {run['seed']}: {threat['norm']} eps {threat['eps']:.4g}",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        title_style="bold",
    )
    table.add_column("attack", no_wrap=True)
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
            f"{attack['seconds']:.1f}",
        )
    for name in results["inapplicable"]:
        table.add_row(name, "not applicable")
    if worst := results["worst_case"]:
        table.add_section()
        table.add_row("worst case", *_cells(worst, "robust_accuracy"), style="bold")

    masking = results["masking"]
    output = io.StringIO()
    console = Console(file=output, markup=False, width=width or max(shutil.get_terminal_size().columns, 80))
    console.print(table)
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
    return _percent(result[name]), f"{100 * low:.1f} .. {100 * high:.1f}", f"{result['n']:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
