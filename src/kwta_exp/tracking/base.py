"""Copies what a run folder holds to a tracker, each part once.

The run folder stays the record, and a tracker only shows it. So one function, :func:`log_now`, is enough for a
run that is going on, one that continues, and one that was finished long ago: it logs what the tracker lacks.
"""

import importlib.util
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import dataclasses

from kwta_exp import attempts
from kwta_exp.errors import UserError, shortened
from kwta_exp.failures import first_line
from kwta_exp.fields import STRICT
from kwta_exp.report.runs import Run, tells_runs_apart
from kwta_exp.storage import read_lines, sha256_of_json
from kwta_exp.sweeps import SWEEPS, Sweep

log = logging.getLogger(__name__)

End = Literal["finished", "failed", "interrupted"]
"""How an attempt at a run ended."""

Value = bool | int | float | str


@dataclass(frozen=True)
class TrackedRun:
    """A run folder, as a tracker sees it.

    Attributes:
        folder: the run's.
        id: 16 hex digits, of the folder's name and the time of the first attempt in it: a run that continues
            has the same, and a run that was started again (``rerun=true``) has another.
        name: ``<name>/s<seed>-<hash>``.
        grid: the name of its grid's folder; ``None`` outside a grid.
    """

    folder: Path
    id: str
    name: str
    grid: str | None

    @classmethod
    def of(cls, folder: Path, grid: str | None) -> "TrackedRun":
        """The run in ``folder``, which has to exist."""
        name = f"{folder.absolute().parent.name}/{folder.name}"
        first = next(iter(attempts.read(folder)), {})
        return cls(folder, sha256_of_json([name, first.get("started")])[:16], name, grid)

    def parameters(self) -> dict[str, Value]:
        """Options and values that tell runs apart, without those of each attack, which the suite stands for."""
        return {
            key: value if isinstance(value, Value) else str(value)
            for key, value in Run.read(self.folder).settings.items()
            if value is not None
            and tells_runs_apart(key)
            and not key.startswith(("attack", "scale."))
            and not str(value).startswith("${")  # the value that it stands for is there too
        }


@dataclass
class Log(ABC):
    """A tracked run, open for writing.

    Attributes:
        epoch: the last one that is logged; 0 if none is.
        evaluations: the folder names of the evaluations that are logged.
        figures: the names of the figures that are logged.
    """

    epoch: int = 0
    evaluations: set[str] = field(default_factory=set)
    figures: set[str] = field(default_factory=set)

    @abstractmethod
    def add_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Log the values of one epoch."""

    @abstractmethod
    def add_evaluation(self, name: str, results: Mapping[str, Any]) -> None:
        """Log the results of a finished evaluation, of the folder ``name``."""

    @abstractmethod
    def add_figure(self, path: Path) -> None:
        """Log a PNG."""

    @abstractmethod
    def close(self, end: End) -> None:
        """End the tracked run, for now."""


class Tracking(ABC):
    """A tracker, as configured; building it loads none of its packages."""

    option: ClassVar[str]
    """Its name in ``tracking=``."""
    modules: ClassVar[tuple[str, ...]]
    """What has to be importable."""
    packages: ClassVar[str]
    """What pip installs for that."""

    def __post_init__(self) -> None:
        missing = [module for module in self.modules if not _is_installed(module)]
        if missing:
            raise UserError(
                f"tracking={self.option} needs {', '.join(missing)}, not installed here; expected"
                f" python -m pip install {self.packages}, or tracking=none"
            )

    @abstractmethod
    def open(self, run: TrackedRun) -> Log:
        """Continue the tracked run of this id, or begin it; no network is used but a configured server."""


@dataclasses.dataclass(frozen=True, config=STRICT)
class NoTracking(Tracking):
    """``tracking=none``: the run folder alone."""

    option = "none"
    modules = ()
    packages = ""

    def open(self, run: TrackedRun) -> Log:
        raise NotImplementedError("tracking=none logs nothing")


def log_now(tracked: Log, folder: Path) -> None:
    """Log the epochs, finished evaluations and figures in a run folder that are not logged yet."""
    metrics = folder / "metrics.jsonl"
    for record in read_lines(metrics) if metrics.exists() else ():
        epoch = record["epoch"]
        if epoch > tracked.epoch:
            tracked.add_epoch(epoch, _values(record))
            tracked.epoch = epoch

    found = {path.parent.name for path in folder.glob("evaluation/*/results.json")}
    if new := found - tracked.evaluations:
        read = Run.read(folder)
        by_time = sorted(new & read.evaluations.keys(), key=lambda name: _written(folder, name))
        for name in by_time:
            tracked.add_evaluation(name, read.evaluations[name])
            tracked.evaluations.add(name)

    for path in sorted(folder.glob("figures/*.png")):
        if path.name not in tracked.figures and path.is_file():
            tracked.add_figure(path)
            tracked.figures.add(path.name)


@contextmanager
def followed(tracking: Tracking, folder: Path, grid: str | None) -> Iterator[Callable[[], None]]:
    """A function that logs what is new in a run folder; call it whenever something is.

    Whatever goes wrong with the tracker becomes one warning, and the run goes on without it.

    Args:
        tracking: where to.
        folder: of the run, which has to exist.
        grid: the name of the grid that the run is a job of.
    """
    follower = _Follower(tracking, folder, grid)
    try:
        yield follower.update
    except BaseException as error:
        follower.close("failed" if isinstance(error, Exception) else "interrupted")
        raise
    follower.close("finished")


class _Follower:
    def __init__(self, tracking: Tracking, folder: Path, grid: str | None) -> None:
        self._tracking, self._folder, self._grid = tracking, folder, grid
        self._log: Log | None = None
        self._stopped = isinstance(tracking, NoTracking)

    def update(self) -> None:
        if self._stopped:
            return
        try:
            if self._log is None:
                self._log = self._tracking.open(TrackedRun.of(self._folder, self._grid))
            log_now(self._log, self._folder)
        except Exception as error:  # a library's, of any type
            self._stop(error)

    def close(self, end: End) -> None:
        try:
            if self._log is not None:
                self._log.close("failed" if self._stopped else end)
        except Exception as error:
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        if not self._stopped:
            log.warning(
                "%s; the run goes on. Later, kwta-exp track %s %s logs what is missing",
                _explained(self._tracking, error), self._tracking.option, self._folder,
            )  # fmt: skip
        self._stopped = True


def log_runs(tracking: Tracking, runs: Sequence[Run]) -> str:
    """Log what the tracker lacks of runs that do not run now; returns what was done, as a line.

    Raises:
        UserError: if the tracker fails.
    """
    logged = 0
    grids: dict[Path, dict[Path, str]] = {}
    for run in runs:
        if run.state in ("running", "damaged"):
            log.warning("%s: is %s; not logged", run.folder, run.state)
            continue
        outputs = run.folder.absolute().parent.parent
        if outputs not in grids:
            grids[outputs] = _grids(outputs)
        try:
            tracked = tracking.open(TrackedRun.of(run.folder, grids[outputs].get(run.folder.absolute())))
            log_now(tracked, run.folder)
            tracked.close(run.state if run.state in ("finished", "failed") else "interrupted")
        except Exception as error:
            raise UserError(f"{run.folder}: {_explained(tracking, error)}") from error
        logged += 1
    return f"{logged} of {len(runs)} runs are logged: {tracking}"


def _grids(outputs: Path) -> dict[Path, str]:
    """The name of its grid for each run folder that is a job's."""
    sweeps = map(Sweep, sorted(outputs.glob(f"{SWEEPS}/*")))
    return {folder: sweep.path.name for sweep in sweeps for folder in sweep.runs()}


def _explained(tracking: Tracking, error: Exception) -> str:
    return f"tracking={tracking.option} failed ({type(error).__name__}: {shortened(first_line(error))})"


def outcome(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation by name, which begins with its suite; accuracies in [0, 1]."""
    worst, masking = results["worst_case"], results["masking"]
    found = {"clean_accuracy": results["clean"]["accuracy"]}
    found |= {f"attack/{name}": attack["robust_accuracy"] for name, attack in results["attacks"].items()}
    if worst is not None:
        found["worst_case"] = worst["robust_accuracy"]
    for check in (*masking.get("passed", ()), *masking["flags"]):
        found[f"check/{check['check']}"] = check["value"]
    suite = results["run"]["suite"]
    return {safe(f"{suite}/{name}"): float(value) for name, value in found.items()}


def safe(name: str) -> str:
    """``name`` with only the characters that every tracker takes."""
    return re.sub(r"[^A-Za-z0-9_./ -]", "_", name)


def _values(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of ``metrics.jsonl``, by name."""
    return {
        f"validation/{name[4:]}" if name.startswith("val_") else f"training/{name}": float(value)
        for name, value in record.items()
        if name != "epoch" and isinstance(value, int | float)
    }


def _written(folder: Path, name: str) -> float:
    return (folder / "evaluation" / name / "results.json").stat().st_mtime


def _is_installed(module: str) -> bool:
    """Whether a package is there; a folder of its name, such as a tracker leaves, is none."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None
