"""Accuracy against eps, from all evaluations of each run."""

from collections.abc import Sequence

from kwta_exp.draw.groups import groups
from kwta_exp.draw.style import Drawing, Rows, span, styled, titled
from kwta_exp.errors import UserError
from kwta_exp.evaluation.results import wilson
from kwta_exp.report.curve import Curve, curves
from kwta_exp.report.runs import Run

_NORMS = {"linf": "L-inf", "l2": "L2"}


def rows(label: str, curve: Curve) -> Rows:
    """A row for eps 0, the clean accuracy, and one for each eps: the worst case of all evaluations up to it."""
    shares = [(0.0, curve.clean_accuracy, "")]
    shares += [(point.eps, point.cumulative, " ".join(point.suites)) for point in curve.points]
    found = []
    for eps, share, suites in shares:
        low, high = wilson(round(share * curve.n), curve.n)
        found.append(
            {"run": label, "norm": curve.norm, "eps": eps, "accuracy": share, "low": low, "high": high}
            | {"n": curve.n, "suites": suites}
        )
    return found


def draw(runs: Sequence[Run]) -> Drawing:
    """The figure, a curve for each run with bars for the 95% intervals (Wilson) of its images, and its numbers.

    Of a run whose evaluations differ in norm or images it takes the curve with the most values of eps.

    Raises:
        UserError: if a run has no evaluation with attacks, there are too many runs, or the norms differ.
    """
    given = groups("eps", runs, seeds_apart=True)
    tables = []
    for each in given:
        for run in each.runs:
            longest = max(curves(run.folder), key=lambda curve: (len(curve.points), curve.n))
            tables.append((each, rows(each.label, longest)))
    norms = {row["norm"] for _, table in tables for row in table}
    if len(norms) > 1:
        raise UserError(f"draw eps: these runs differ in the threat's norm: {', '.join(sorted(norms))}")
    with styled():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.3, 2.3 + 0.14 * ((len(tables) + 1) // 2)))
        axis = figure.subplots()
        for each, table in tables:
            shares = [100 * row["accuracy"] for row in table]
            ends = [
                [share - 100 * row["low"] for share, row in zip(shares, table, strict=True)],
                [100 * row["high"] - share for share, row in zip(shares, table, strict=True)],
            ]
            axis.errorbar(
                [row["eps"] for row in table], shares, ends, capsize=2, elinewidth=0.8, label=each.label,
                **each.look,
            )  # fmt: skip
        axis.set_ylim(0, 100)
        axis.locator_params(axis="x", nbins=6)
        axis.set_xlim(left=-0.02 * max(row["eps"] for _, table in tables for row in table) - 1e-9)
        axis.set_xlabel(f"eps ({_NORMS[norms.pop()]}; 0: clean)")
        axis.set_ylabel("accuracy (%)")
        images = span(row["n"] for _, table in tables for row in table)
        titled(figure, f"Worst case of all attacks up to eps; n = {images}")
        figure.legend(loc="outside lower center", ncols=2)
    return figure, [row for _, table in tables for row in table]
