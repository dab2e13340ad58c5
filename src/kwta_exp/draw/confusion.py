"""Accuracy of each class, clean and in the worst case, and the classes that attacks make of which."""

from typing import Any

import numpy as np
import numpy.typing as npt

from kwta_exp.draw.style import WARNING, Drawing, Rows, named, span, styled, titled
from kwta_exp.errors import UserError
from kwta_exp.evaluation.outcome import Outcome
from kwta_exp.evaluation.results import wilson
from kwta_exp.evaluation.stored import Stored

_COUNTED = 10
"""Up to this many classes the cells of the matrix show counts, and every class has a tick."""


_MOST = 1000


def predictions(outcome: Outcome) -> npt.NDArray[np.int64]:
    """The class of each image in the worst case, int64 ``(n,)``.

    That of the clean image if it is wrong already, that of the adversarial image of the first attack that
    fooled it, or else the label.
    """
    columns = outcome.clean.columns
    found: npt.NDArray[np.int64] = columns["prediction"].astype(np.int64)
    row_of = {int(index): row for row, index in enumerate(columns["index"])}
    undecided = outcome.clean_correct
    for record in (record for record in outcome.records.values() if len(record)):
        at = np.array([row_of[int(index)] for index in record.columns["index"]])
        first = record.columns["fooled"] & undecided[at]
        found[at[first]] = record.columns["prediction"][first]
        undecided = undecided.copy()
        undecided[at[first]] = False
    return found


def matrix(outcome: Outcome) -> npt.NDArray[np.int64]:
    """Images by label (row) and class in the worst case (column), int64 ``(K, K)``; K are the classes seen."""
    labels, worst = outcome.clean.columns["label"], predictions(outcome)
    classes = int(max(labels.max(), worst.max())) + 1
    if classes > _MOST or min(labels.min(), worst.min()) < 0:
        raise UserError(f"draw confusion: a record names class {classes - 1}; expected at most {_MOST} classes")
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, worst), 1)
    return counts


def rows(stored: Stored) -> Rows:
    """A row for each class: its images, its accuracies with 95% intervals (Wilson), its row of the matrix.

    Raises:
        UserError: if no attack ran.
    """
    outcome = stored.outcome
    if not outcome.records:
        raise UserError(f"{stored.folder}: no attack ran; draw confusion expects an evaluation with attacks")
    counts, found = matrix(outcome), []
    for label, row in enumerate(counts):
        of_class = outcome.clean.columns["label"] == label
        n = int(of_class.sum())
        entry: dict[str, Any] = {"class": label, "n": n}
        for name, right in (("clean", outcome.clean_correct), ("worst", outcome.robust)):
            count = int(right[of_class].sum())
            low, high = wilson(count, n) if n else (None, None)
            entry |= {name: count / n if n else None, f"{name} low": low, f"{name} high": high}
        found.append(entry | {f"as {other}": int(count) for other, count in enumerate(row)})
    return found


def draw(stored: Stored) -> Drawing:
    """The figure, accuracies above and the matrix below, and its numbers.

    Raises:
        UserError: if no attack ran.
    """
    table = rows(stored)
    with styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.3, 5.0))
        above, below = figure.subplots(2, 1, height_ratios=[1, 1.7])
        _accuracies(above, table)
        _matrix(below, np.array([[row[f"as {other}"] for other in range(len(table))] for row in table]))
        titled(figure, f"{named(stored.results)}; n = {span(row['n'] for row in table if row['n'])} a class")
    return figure, table


def _accuracies(axis: Any, table: Rows) -> None:
    kept = [row for row in table if row["n"]]
    looks = (("clean", "clean", "#0072B2", "o", -0.12), ("worst", "worst case", WARNING, "s", 0.12))
    for name, label, colour, marker, aside in looks:
        shares = np.array([[row[name], row[f"{name} low"], row[f"{name} high"]] for row in kept]).T * 100
        axis.errorbar(
            [row["class"] + aside for row in kept], shares[0], [shares[0] - shares[1], shares[2] - shares[0]],
            color=colour, marker=marker, linestyle="none", markersize=3, elinewidth=0.8, label=label,
            clip_on=False,
        )  # fmt: skip
    axis.set_ylim(0, 100)
    axis.set_ylabel("accuracy (%)")
    axis.set_xlabel("class")
    axis.legend(loc="lower right", bbox_to_anchor=(1.02, 0.97), ncols=2, columnspacing=1, handletextpad=0.2)
    if len(table) <= _COUNTED:
        axis.set_xticks(range(len(table)))


def _matrix(axis: Any, counts: npt.NDArray[np.int64]) -> None:
    shares = 100 * counts / np.maximum(1, counts.sum(1, keepdims=True))
    drawn = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axis.grid(visible=False)
    axis.set_xlabel("class in the worst case")
    axis.set_ylabel("label")
    if len(counts) <= _COUNTED:
        axis.set_xticks(range(len(counts)))
        axis.set_yticks(range(len(counts)))
        for (row, column), count in np.ndenumerate(counts):
            if count:
                dark = shares[row, column] > 50
                axis.text(
                    column, row, f"{count}", color="white" if dark else "black", ha="center", va="center",
                    fontsize=6, in_layout=False,
                )  # fmt: skip
    bar = axis.figure.colorbar(drawn, ax=axis, shrink=0.8)
    bar.set_label("share of the label's images (%)")
    bar.outline.set_visible(False)
