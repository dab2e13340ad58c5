"""Training curves: loss, accuracies and the sparsity ratio against the epoch."""

from collections.abc import Sequence
from typing import Any

from kwta_exp.draw.groups import Group, groups
from kwta_exp.draw.style import Drawing, Rows, logarithmic, look, span, styled, titled
from kwta_exp.errors import UserError
from kwta_exp.report.runs import Run
from kwta_exp.report.summary import over_seeds
from kwta_exp.run_folder import RunFolder
from kwta_exp.storage import read_lines

MEASURES = {
    "loss": "training loss",
    "accuracy": "training (%)",
    "val_accuracy": "validation (%)",
    "val_robust_accuracy": "val. attacked (%)",
    "sparsity_ratio": "sparsity ratio",
}
"""What ``metrics.jsonl`` holds that is drawn, and the names of the axes."""

_SHARES = {"accuracy": "training", "val_accuracy": "validation", "val_robust_accuracy": "validation, attacked"}


def rows(of: Group) -> Rows:
    """A row for each epoch that all runs of a group have: mean and 95% interval (Student's t) over seeds.

    Of a loss, whose axis is logarithmic, ``low`` and ``high`` are the least and the largest of the seeds.
    Measures that not all of them have are left out, and so is a ratio that never changes.

    Raises:
        UserError: if a run has no ``metrics.jsonl`` or it is damaged.
    """
    histories = [read_lines(_metrics(run)) for run in of.runs]
    found: Rows = []
    for records in zip(*histories, strict=False):
        row: dict[str, Any] = {"runs": of.label, "seeds": len(of.runs), "epoch": len(found) + 1}
        for name in MEASURES:
            if not all(isinstance(record.get(name), int | float) for record in records):
                continue
            values = [float(record[name]) for record in records]
            row |= {name: values[0], f"{name} low": values[0], f"{name} high": values[0]}
            if len(values) > 1:
                interval = _mean_and_range(values) if name == "loss" else over_seeds(values)
                row |= dict(zip((name, f"{name} low", f"{name} high"), interval, strict=True))
        found.append(row)
    if len({row.get("sparsity_ratio") for row in found}) < 2:
        found = [{key: row[key] for key in row if not key.startswith("sparsity_ratio")} for row in found]
    return found


def draw(runs: Sequence[Run]) -> Drawing:
    """The figure and its numbers.

    Runs that differ in their seed alone are one curve, with a shade for the interval. A single curve has one
    panel for all accuracies; several have a panel for each.

    Raises:
        UserError: if a run was not trained, or there are too many curves.
    """
    trained = [run for run in runs if RunFolder(run.folder).metrics.is_file()]
    if not trained:
        raise UserError("draw training: no metrics.jsonl in these runs; expected runs that were trained")
    curves = groups("training", trained)
    tables = [rows(each) for each in curves]
    names = [name for name in MEASURES if any(name in row for table in tables for row in table)]
    if not names:
        raise UserError("draw training: no epoch is finished in these runs")
    single = len(curves) == 1 and "accuracy" in names
    panels = [name for name in names if not (single and name in ("val_accuracy", "val_robust_accuracy"))]
    with styled():
        from matplotlib.figure import Figure

        height = 1.15 * len(panels) + 0.5 + 0.14 * ((len(curves) + 1) // 2)
        figure = Figure(figsize=(3.3, height))
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, name in zip(axes, panels, strict=True):
            if single and name == "accuracy":
                for number, (measure, label) in enumerate(_SHARES.items()):
                    own = look(number) | {"color": curves[0].look["color"]}
                    _curve(axis, tables[0], measure, own, label, number / 3)
                axis.set_ylabel("accuracy (%)")
            else:
                for number, (curve, table) in enumerate(zip(curves, tables, strict=True)):
                    _curve(axis, table, name, curve.look, curve.label, number / len(curves))
                axis.set_ylabel(MEASURES[name])
            if name == "loss" and all(row["loss"] > 0 for table in tables for row in table if "loss" in row):
                logarithmic(axis.yaxis)
            if name in _SHARES:
                axis.set_ylim(0, 100)
        axes[-1].set_xlabel("epoch")
        titled(figure, _title(trained, curves))
        legend = axes[panels.index("accuracy")] if single else axes[0]
        handles, labels = legend.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3 if single else 2)
    keys = dict.fromkeys(key for table in tables for row in table for key in row)
    return figure, [{key: row.get(key) for key in keys} for table in tables for row in table]


def _metrics(run: Run) -> Any:
    return RunFolder(run.folder).metrics


def _mean_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    return sum(values) / len(values), min(values), max(values)


def _title(runs: Sequence[Run], curves: Sequence[Group]) -> str:
    names = {run.folder.parent.name for run in runs}
    what = names.pop() if len(names) == 1 else "training"
    return f"{what}; seeds: {span(len(each.runs) for each in curves)}"


def _curve(axis: Any, table: Rows, name: str, style: dict[str, Any], label: str, aside: float = 0) -> None:
    """One line with its shade; ``aside``, in [0, 1), moves its markers from those of the others."""
    kept = [row for row in table if name in row]
    if not kept:
        return
    scale = 100 if name in _SHARES else 1
    epochs = [row["epoch"] for row in kept]
    low, high = ([scale * row[f"{name} {end}"] for row in kept] for end in ("low", "high"))
    if low != high:
        axis.fill_between(epochs, low, high, color=style["color"], alpha=0.15, linewidth=0)
    every = max(1, len(kept) // 6)
    markers = (int(aside * every), every)
    axis.plot(epochs, [scale * row[name] for row in kept], label=label, markevery=markers, **style)
