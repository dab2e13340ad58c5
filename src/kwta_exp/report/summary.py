"""One table of many runs: a row for each setting, with its seeds as mean and interval.

    kwta-exp summary [PATTERN] [KEY=VALUE ...] [--baseline KEY=VALUE ...] [--pivot KEY KEY]

Only evaluations that measured the same are put side by side: the same suite with the same attacks, the same
threat and number of images. Others get a table of their own.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kwta_exp.errors import UserError
from kwta_exp.report.runs import Run, shown, varying
from kwta_exp.storage import read_json, sha256_of_json

CLEAN, WORST = "clean", "worst case"

Row = dict[str, str]
"""The cells of one row, by column."""


@dataclass(frozen=True)
class Table:
    """Rows of one kind of evaluation.

    Attributes:
        title: what was measured.
        columns: in order.
        rows: the cells of each row, as text; a missing cell is empty.
        values: for the same rows, unrounded numbers, for CSV.
        notes: what a reader has to know.
    """

    title: str
    columns: list[str]
    rows: list[Row]
    values: list[dict[str, Any]]
    notes: list[str]


@dataclass(frozen=True)
class Measured:
    """One evaluation of one run."""

    run: Run
    evaluation: str
    results: Mapping[str, Any]

    @property
    def seed(self) -> int:
        return int(self.results["run"]["seed"])

    @property
    def folder(self) -> Path:
        return self.run.folder / "evaluation" / self.evaluation

    @property
    def parts(self) -> dict[str, Mapping[str, Any]]:
        """What ``results.json`` says of the clean images, of each attack and of the worst case."""
        worst = self.results["worst_case"]
        return {CLEAN: self.results["clean"], **self.results["attacks"], **({WORST: worst} if worst else {})}

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two evaluations must have in common to be compared."""
        run, threat = self.results["run"], self.results["threat"]
        try:
            attacks = read_json(self.folder / "evaluation.json")["identity"]["attacks"]
        except (UserError, LookupError, TypeError):
            attacks = list(self.results["attacks"])
        n, scale = self.results["clean"]["n"], run.get("scale", "full")
        return run["suite"], threat["norm"], threat["eps"], n, sha256_of_json(attacks), scale


def measured(runs: Iterable[Run]) -> list[Measured]:
    """Every finished evaluation of ``runs``."""
    return [Measured(run, name, results) for run in runs for name, results in run.evaluations.items()]


def tables(found: Sequence[Measured], baseline: Sequence[str] = ()) -> list[Table]:
    """A table for each kind of evaluation, the largest first.

    Args:
        found: evaluations.
        baseline: ``KEY=VALUE`` texts that exactly one row must match; every row is compared with it.

    Raises:
        UserError: if there is none, or ``baseline`` does not match one row.
    """
    if not found:
        raise UserError("no finished evaluation among these runs; kwta-exp list shows how far they are")
    groups: dict[tuple[Any, ...], list[Measured]] = {}
    for each in found:
        groups.setdefault(each.kind, []).append(each)
    ordered = sorted(groups.values(), key=len, reverse=True)
    made = [_table(group, baseline) for group in ordered]
    if len(made) > 1:
        note = f"{len(made)} kinds of evaluations, which are not comparable: a table for each"
        made[0].notes.insert(0, note)
    return made


def _table(group: Sequence[Measured], baseline: Sequence[str]) -> Table:
    keys = [key for key in varying([each.run for each in group]) if key != "seed"]
    settings: dict[tuple[str, ...], list[Measured]] = {}
    for each in group:
        chosen = each.run.settings
        values_of_keys = tuple(shown(chosen[key]) if key in chosen else "" for key in keys)
        settings.setdefault(values_of_keys, []).append(each)
    names = list(dict.fromkeys(name for each in group for name in each.parts))
    names.sort(key=lambda name: (name != CLEAN, name == WORST))
    rows, values = [], []
    settings = {setting: _latest_of_each_seed(of_setting) for setting, of_setting in settings.items()}
    for setting, evaluations in settings.items():
        row: Row = {**dict(zip(keys, setting, strict=True)), "seeds": str(len(evaluations))}
        numbers: dict[str, Any] = {**row, "seeds": len(evaluations)}
        for name in names:
            parts = [each.parts[name] for each in evaluations if name in each.parts]
            if parts:
                mean, low, high = _interval(parts)
                row[name] = f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
                numbers |= {name: mean, f"{name} low": low, f"{name} high": high}
        row["verdict"] = numbers["verdict"] = _verdicts(evaluations)
        rows.append(row)
        values.append(numbers)
    run, threat = group[0].results["run"], group[0].results["threat"]
    scale = "" if run.get("scale", "full") == "full" else f"scale={run['scale']}, "
    title = (
        f"{scale}suite {run['suite']}, {threat['norm']} eps {threat['eps']:g},"
        f" n = {group[0].results['clean']['n']}"
    )
    notes = [
        "accuracies in %; with several seeds their mean and its 95% interval (t) over seeds, with one seed the"
        " 95% interval (Wilson) over images"
    ]
    columns = [*keys, "seeds", *names, "verdict"]
    if baseline:
        from kwta_exp.report.paired import differences

        found, note = differences(list(settings.values()), baseline)
        for row, number, difference in zip(rows, values, found, strict=True):
            row |= difference.cells()
            number |= difference.numbers()
        notes.append(note)
        columns += ["difference", "p"]
    return Table(title, columns, rows, values, notes)


def _latest_of_each_seed(evaluations: Sequence[Measured]) -> list[Measured]:
    """One evaluation for each seed: the run's latest, if a setting was evaluated more than once."""
    kept: dict[int, Measured] = {}
    for each in sorted(evaluations, key=lambda each: (each.run.started, each.run.name)):
        kept[each.seed] = each
    return [kept[seed] for seed in sorted(kept)]


def _verdicts(evaluations: Sequence[Measured]) -> str:
    """The verdict, or how many seeds have which."""
    found = [str(each.results["masking"]["verdict"]) for each in evaluations]
    counted = {verdict: found.count(verdict) for verdict in dict.fromkeys(found)}
    if len(counted) == 1:
        return found[0]
    return ", ".join(f"{count} {verdict}" for verdict, count in counted.items())


def _interval(parts: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """The mean accuracy and its 95% interval: over seeds, or over the images of one seed."""
    shares = [float(part.get("accuracy", part.get("robust_accuracy"))) for part in parts]
    if len(parts) == 1:
        low, high = parts[0]["ci95"]
        return shares[0], float(low), float(high)
    return over_seeds(shares)


def over_seeds(shares: Sequence[float]) -> tuple[float, float, float]:
    """The mean of two or more accuracies and its 95% interval by Student's t, inside [0, 1]."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    mean = float(np.mean(shares))
    half = float(stdtrit(len(shares) - 1, 0.975)) * float(np.std(shares, ddof=1)) / math.sqrt(len(shares))
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def pivot(table: Table, row_key: str, column_key: str, value: str) -> Table:
    """The same table with one key down and another across.

    Args:
        table: to rearrange.
        row_key: the key whose values become rows.
        column_key: the key whose values become columns.
        value: the column whose cells are shown, such as ``"worst case"``.

    Raises:
        UserError: for a name that is not a column, or if several rows would share a cell.
    """
    for name in (row_key, column_key, value):
        if name not in table.columns:
            raise UserError(f"{name}: not a column of this table; expected one of {', '.join(table.columns)}")
    cells: dict[str, Row] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for row, values in zip(table.rows, table.values, strict=True):
        down, across = row.get(row_key, ""), row.get(column_key, "")
        line, number = cells.setdefault(down, {row_key: down}), numbers.setdefault(down, {row_key: down})
        if across in line:
            keys = table.columns[: table.columns.index("seeds")]
            others = [name for name in keys if name not in (row_key, column_key)]
            raise UserError(
                f"pivot {row_key} {column_key}: several rows have {row_key}={down} and {column_key}={across};"
                f" choose one with KEY=VALUE (they differ in {', '.join(others)})"
            )
        line[across], number[across] = row.get(value, ""), values.get(value)
    across_values = list(dict.fromkeys(row.get(column_key, "") for row in table.rows))
    title = f"{table.title}: {value} by {row_key} and {column_key}"
    return Table(title, [row_key, *across_values], list(cells.values()), list(numbers.values()), table.notes)
