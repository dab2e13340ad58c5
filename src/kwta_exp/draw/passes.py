"""Accuracy against the passes spent on an image, for each attack: who finds what at what price."""

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np

from kwta_exp.draw.style import WARNING, Drawing, Rows, logarithmic, look, named, span, styled, titled
from kwta_exp.errors import UserError
from kwta_exp.evaluation.results import wilson
from kwta_exp.evaluation.stored import Stored

_LEFT = 0.8
"""Where the axis of passes begins: left of one pass."""


def rows(stored: Stored) -> Rows:
    """The steps of each attack's curve.

    Each attack is seen alone, on the images that all attacks ran on: no other one ran before it. An image is
    fooled once its forward and backward passes up to the first error inside the threat are spent (columns
    ``queries`` and ``steps``); an image that the attack made on another network costs none.

    Returns:
        By attack: a row at no passes (the clean accuracy), one for each number of passes that fooled an image,
        and one at the most passes that an image got, with the 95% interval (Wilson) of ``n`` images.

    Raises:
        UserError: if no attack ran.
    """
    outcome, found = stored.outcome, list[dict[str, Any]]()
    if not outcome.records:
        raise UserError(f"{stored.folder}: no attack ran; draw passes expects an evaluation with attacks")
    for name, record in outcome.records.items():
        n = stored.results["attacks"][name]["n"]
        spent, fooled = np.zeros(0, np.int64), np.zeros(0, np.bool_)
        if len(record):
            judged = np.isin(record.columns["index"], outcome.clean.columns["index"][:n])
            spent = (record.columns["queries"] + record.columns["steps"])[judged]
            fooled = record.columns["fooled"][judged]
        ends = np.sort(spent[fooled])
        right = int(outcome.clean_correct[:n].sum())
        at = np.unique([0, *ends, spent.max(initial=0)])
        left = right - np.searchsorted(ends, at, "right")
        found += [
            {
                "attack": name,
                "passes": int(passes),
                "accuracy": int(count) / n,
                "low": None,
                "high": None,
                "n": n,
            }
            for passes, count in zip(at, left, strict=True)
        ]
        found[-1]["low"], found[-1]["high"] = wilson(int(left[-1]), n)
    return found


def draw(stored: Stored) -> Drawing:
    """The figure, a step function for each attack with a bar for the interval at its end, and its numbers.

    Raises:
        UserError: if no attack ran.
    """
    table = rows(stored)
    worst = stored.results["worst_case"]
    with styled():
        from matplotlib.figure import Figure

        curves = [list(steps) for _, steps in groupby(table, key=lambda row: row["attack"])]
        lines = (len(curves) + 2) // 2
        figure = Figure(figsize=(3.3, 2.3 + 0.14 * lines))
        axis = figure.subplots()
        for number, curve in enumerate(curves):
            _curve(axis, curve, look(number))
        share = 100 * worst["robust_accuracy"]
        axis.axhline(share, color=WARNING, linewidth=0.8, dashes=(6, 2), label=f"worst case: {share:.1f}%")
        logarithmic(axis.xaxis)
        axis.set_xlim(_LEFT, 1.4 * max(2, *(row["passes"] for row in table)))
        axis.set_ylim(0, 100)
        axis.set_xlabel("passes an image (forward and backward)")
        axis.set_ylabel("accuracy (%)")
        titled(figure, f"{named(stored.results)}; n = {span(row['n'] for row in table)}")
        figure.legend(loc="outside lower center", ncols=2)
    return figure, table


def side_by_side(tables: Mapping[str, Rows]) -> Drawing:
    """The curves of several networks on the same axes, and their numbers.

    Args:
        tables: :func:`rows` by the name to show, each with the same attacks.
    """
    with styled():
        from matplotlib.figure import Figure

        lines = math.ceil(len(tables) / 3)
        columns = math.ceil(len(tables) / lines)
        figure = Figure(figsize=(1.75 * columns + 0.4, 2.0 * lines + 0.6))
        axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for spare in axes.flat[len(tables) :]:
            spare.set_axis_off()
        for axis, (name, table) in zip(axes.flat, tables.items(), strict=False):
            for number, (attack, steps) in enumerate(groupby(table, key=lambda row: row["attack"])):
                _curve(axis, list(steps), look(number), attack)
            logarithmic(axis.xaxis)
            axis.set_xlim(_LEFT, 1.4 * max(row["passes"] for row in table))
            axis.set_ylim(0, 100)
            axis.set_title(f"{name}\nn = {span(row['n'] for row in table)}")
            axis.set_xlabel("passes an image")
        for line in axes:
            line[0].set_ylabel("accuracy (%)")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure, [{"network": name, **row} for name, table in tables.items() for row in table]


def _curve(axis: Any, curve: Rows, style: dict[str, Any], label: str | None = None) -> None:
    passes, shares = [max(row["passes"], _LEFT) for row in curve], [100 * row["accuracy"] for row in curve]
    last = curve[-1]
    label = label or f"{last['attack']}: {shares[-1]:.1f}%"
    axis.step(passes, shares, where="post", markevery=[len(curve) - 1], label=label, **style)
    ends = [[shares[-1] - 100 * last["low"]], [100 * last["high"] - shares[-1]]]
    axis.errorbar(passes[-1:], shares[-1:], ends, color=style["color"], capsize=2, elinewidth=0.8)
