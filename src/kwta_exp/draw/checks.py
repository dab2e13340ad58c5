"""The checks behind a verdict: what was measured against the thresholds, and which are raised."""

from collections.abc import Mapping
from typing import Any

from kwta_exp.draw.style import WARNING, Drawing, Rows, named, styled, titled
from kwta_exp.errors import UserError

_LINEAR = 0.01
"""Up to this share the axis is linear, beyond it logarithmic."""


def rows(results: Mapping[str, Any]) -> Rows:
    """A row for each check that was made, in the order of ``results.json``: the raised ones first.

    Raises:
        UserError: if none was.
    """
    masking = results["masking"]
    found = [(each, True) for each in masking["flags"]] + [(each, False) for each in masking.get("passed", [])]
    if not found:
        raise UserError("draw checks: this evaluation made no checks; suite=strong makes them")
    return [
        {
            "check": each["check"], "value": each["value"], "lower95": each.get("lower95"),
            "threshold": each["threshold"], "raised": raised,
        }
        for each, raised in found
    ]  # fmt: skip


def draw(results: Mapping[str, Any]) -> Drawing:
    """The figure, a line for each check, and its numbers.

    A check is raised if its value, or the lower bound of its 95% interval where it has one, exceeds the
    threshold.

    Raises:
        UserError: if no check was made.
    """
    table = rows(results)
    with styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.3, 0.9 + 0.17 * len(table)))
        axis = figure.subplots()
        for place, row in enumerate(table):
            _line(axis, place, row)
        for label, look in (("passed", _look(False)), ("raised", _look(True)), ("threshold", _THRESHOLD)):
            axis.plot([], [], label=label, **look)
        axis.set_xscale("symlog", linthresh=_LINEAR)
        axis.set_xlim(-0.1 * _LINEAR, 1.2)
        axis.set_xticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
        axis.set_yticks(range(len(table)), [row["check"].replace("_", " ") for row in table])
        axis.set_ylim(len(table) - 0.5, -0.5)
        axis.tick_params(axis="y", labelsize=6)
        axis.set_xlabel("share (linear to 0.01; line: to lower 95% bound)", loc="right")
        titled(figure, f"{named(results)}: {results['masking']['verdict']}")
        figure.legend(loc="outside lower center", ncols=3)
    return figure, table


_THRESHOLD = {"color": "#000000", "marker": "|", "linestyle": "none", "markersize": 8}


def _look(raised: bool) -> dict[str, Any]:
    colour, marker = (WARNING, "X") if raised else ("#0072B2", "o")
    return {"color": colour, "marker": marker, "linestyle": "none", "markersize": 6 if raised else 4}


def _line(axis: Any, place: int, row: Mapping[str, Any]) -> None:
    look = _look(row["raised"])
    if row["lower95"] is not None:
        axis.plot([row["lower95"], row["value"]], [place, place], color=look["color"], linewidth=1)
    axis.plot([row["threshold"]], [place], **_THRESHOLD)
    axis.plot([row["value"]], [place], **look)
