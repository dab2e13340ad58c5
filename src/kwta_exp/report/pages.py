"""``report.html``: a run, or many runs, on one page that needs no network.

    kwta-exp report [FOLDER | PATTERN | KEY=VALUE ...] [-o FILE]

Whatever comes from run folders is escaped, and the page's own policy lets a browser load nothing and run its
one script only.
"""

import base64
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kwta_exp.errors import UserError, printable
from kwta_exp.evaluation.checks import CHECKS
from kwta_exp.report.runs import Run, shown, varying
from kwta_exp.report.summary import CLEAN, WORST, Table, measured, tables
from kwta_exp.run_folder import RunFolder, read_config_file
from kwta_exp.storage import read_json, write_text

_REM_PER_INCH = 7.4

VERDICTS = ("sound", "suspect", "masked", "untested")

_NORMS = {"linf": "L-inf", "l2": "L2"}


@dataclass(frozen=True)
class Figure:
    """A figure of a page.

    Attributes:
        title: what it shows, a few words.
        text: what to see in it, a sentence for those who cannot see it too.
        svg: an ``<svg>`` element, made by this program and not by others.
    """

    title: str
    text: str
    svg: Markup

    @property
    def width(self) -> str:
        """Its width on a page, in rem: a column of a paper, 3.3 inches, is a third of a wide page."""
        points = re.match(r'<svg[^>]*? width="([\d.]+)pt"', self.svg)
        return f"{float(points[1]) / 72 * _REM_PER_INCH:.1f}" if points else "52"


def run_page(run: Run, figures: Sequence[Figure] = ()) -> str:
    """The page of one run: its latest evaluation first.

    Args:
        run: that has a finished evaluation.
        figures: to show.

    Raises:
        UserError: if it has none.
    """
    latest = run.latest
    if latest is None:
        raise UserError(f"{run.folder}: holds no finished evaluation; the command that began it continues")
    environment = _environment(run.folder)
    try:
        configuration = read_config_file(run.folder, "config.yaml")
    except UserError as error:
        configuration = str(error)
    return _rendered(
        "run.html",
        title=latest["run"]["name"],
        run={"scale": "full"} | latest["run"],
        threat=threat_text(latest["threat"]),
        clean=latest["clean"],
        attacks=latest["attacks"],
        inapplicable=latest["inapplicable"],
        worst=latest["worst_case"],
        masking=latest["masking"],
        checks=_checks(latest["masking"]),
        figures=figures,
        others=[_other(name, results) for name, results in run.evaluations.items() if results != latest],
        commit=_commit(environment),
        environment=_shown(environment),
        configuration=configuration,
    )


def grid_page(
    runs: Sequence[Run], title: str, folder: Path, command: str = "", figures: Sequence[Figure] = ()
) -> str:
    """The page of many runs: a table of settings, and each run with a link to its own page.

    Args:
        runs: any, finished or not.
        title: of the page.
        folder: where the page will lie; links are relative to it.
        command: that makes these runs, if it is known.
        figures: to show.
    """
    keys = varying(runs)
    found = measured(runs)
    states = [run.state for run in runs]
    return _rendered(
        "grid.html",
        title=title,
        counts=f"{len(runs)} runs: "
        + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)),
        tables=[_sortable(table) for table in tables(found)] if found else [],
        figures=figures,
        keys=keys,
        runs=[_line(run, keys, folder) for run in runs],
        command=command,
    )


def write_run_page(run: Run, to: Path | None = None, figures: Sequence[Figure] = ()) -> Path:
    """Write the page of a run.

    Args:
        run: that has a finished evaluation.
        to: the file; ``None`` for ``report.html`` in the run's folder.
        figures: to show.
    """
    path = RunFolder(run.folder).report if to is None else to
    write_text(path, run_page(run, figures))
    return path


def write_grid_page(
    runs: Sequence[Run],
    title: str,
    to: Path,
    command: str = "",
    figures: Sequence[Figure] = (),
    figures_of: Callable[[Run], Sequence[Figure]] = lambda _: (),
) -> Path:
    """Write the page of many runs, and that of each run where it is missing or older than its results.

    Args:
        runs: any, finished or not.
        title: of the page.
        to: the file.
        command: that makes these runs, if it is known.
        figures: to show.
        figures_of: the figures for the page of one run.
    """
    for run in runs:
        if run.latest is not None and not RunFolder(run.folder).report_is_current:
            with suppress(UserError):  # a folder of somebody else's, say
                write_run_page(run, figures=figures_of(run))
    write_text(to, grid_page(runs, title, to.absolute().parent, command, figures))
    return to


def threat_text(threat: Mapping[str, Any]) -> str:
    """The threat, such as ``L-inf, eps 8/255``."""
    eps, of_255 = float(threat["eps"]), float(threat["eps"]) * 255
    whole = of_255 >= 1 and abs(of_255 - round(of_255)) < 1e-6
    return f"{_NORMS[threat['norm']]}, eps {f'{round(of_255)}/255' if whole else f'{eps:g}'}"


def _checks(masking: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checks that were made, the raised ones first."""

    def entry(found: Mapping[str, Any], raised: bool) -> dict[str, Any]:
        known = CHECKS.get(found["check"])
        meaning = known.meaning if known else ""
        return {
            "name": found["check"],
            "raised": raised,
            "bears_on": "",
            "meaning": meaning,
            "lower95": None,
        } | {key: found[key] for key in ("value", "threshold", "lower95", "bears_on") if key in found}

    return [entry(each, True) for each in masking["flags"]] + [
        entry(each, False) for each in masking.get("passed", [])
    ]


def _other(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name, "threat": threat_text(results["threat"]), "clean": results["clean"],
        "worst": results["worst_case"], "verdict": results["masking"]["verdict"],
    }  # fmt: skip


def _environment(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "environment.json")
    except UserError:
        return {}


def _commit(environment: Mapping[str, Any]) -> str:
    commit = str(environment.get("commit") or "")
    return commit if commit.isalnum() else ""  # with changes beside it, no checkout gives the source


def _shown(environment: Mapping[str, Any]) -> dict[str, str]:
    """What a reader wants to know of the machine."""
    runtime, packages, gpu = (
        part if isinstance(part := environment.get(name), Mapping) else {}
        for name in ("runtime", "packages", "gpu")
    )
    found = {
        "source": environment.get("commit"), "device": environment.get("device"), "GPU": gpu.get("name"),
        "processor": environment.get("processor"), "cores": environment.get("cores"),
        "threads": runtime.get("threads"), "precision": runtime.get("precision"),
        "Python": environment.get("python"), "torch": packages.get("torch"),
        "kwta_exp": packages.get("kwta_exp"), "system": environment.get("platform"),
    }  # fmt: skip
    return {name: str(value) for name, value in found.items() if value is not None}


def _line(run: Run, keys: Sequence[str], folder: Path) -> dict[str, Any]:
    latest = run.latest
    worst = latest["worst_case"] if latest else None
    page = RunFolder(run.folder).report
    return {
        "name": run.name,
        "link": Path(os.path.relpath(page, folder)).as_posix() if page.is_file() else "",
        "settings": [shown(run.settings[key]) if key in run.settings else "" for key in keys],
        "state": run.state,
        "cause": run.cause,
        "clean": f"{100 * latest['clean']['accuracy']:.1f}" if latest else "",
        "worst": f"{100 * worst['robust_accuracy']:.1f}" if worst else "",
        "verdict": latest["masking"]["verdict"] if latest else "",
        "minutes": f"{run.seconds / 60:.1f}" if run.seconds is not None else "",
    }


def _sortable(table: Table) -> dict[str, Any]:
    """A summary's table, with verdict and worst case first, and the number that each cell sorts by."""
    keys, answers = table.columns[: table.columns.index("seeds") + 1], ["verdict", WORST, CLEAN]
    columns = [*keys, *answers, *(name for name in table.columns if name not in (*keys, *answers))]
    columns = [name for name in columns if name in table.columns]  # without attacks there is no worst case
    rows = [
        [_cell(name, row.get(name, ""), values.get(name)) for name in columns]
        for row, values in zip(table.rows, table.values, strict=True)
    ]
    numbers = [
        number
        for number, name in enumerate(columns)
        if any(isinstance(row.get(name), float) for row in table.values)
    ]
    return {"title": table.title, "columns": columns, "rows": rows, "numbers": numbers, "notes": table.notes}


def _cell(column: str, text: str, value: Any) -> dict[str, Any]:
    verdicts = []
    if column == "verdict":
        verdicts = [{"name": part.split()[-1], "text": part} for part in text.split(", ") if part]
    return {"text": text, "value": text if value is None else value, "verdicts": verdicts}


@cache
def _templates() -> Environment:
    def plain(value: object) -> object:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    made = Environment(
        loader=PackageLoader("kwta_exp.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=plain,
    )  # fmt: skip
    made.filters["percent"] = lambda share: f"{100 * share:.1f}%"
    made.filters["interval"] = lambda ends: f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}%"
    return made


def _rendered(template: str, **content: Any) -> str:
    folder = Path(__file__).parent / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("style.css", "sort.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _templates()
        .get_template(template)
        .render(
            style=Markup(style),
            script=Markup(script),
            script_digest=f"sha256-{digest}",
            **content,
        )
    )
