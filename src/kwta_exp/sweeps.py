"""The folder of a grid: which jobs it has, and how far each is.

``outputs/sweeps/<name>/sweep.json`` says what was asked for, ``jobs/<number>.json`` what became of each job.
The runs themselves lie where they would lie without a grid. The same command gives the same folder, so a
repeated grid continues its record.
"""

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kwta_exp import environment
from kwta_exp.errors import BusyError, UserError, shortened
from kwta_exp.storage import read_json, sha256_of_json, write_json

SWEEPS = "sweeps"


class SkippedError(UserError):
    """A job that is not run: it failed too often, or another job of a grid with ``fail_fast=true`` failed."""


@dataclass(frozen=True)
class Job:
    """What is recorded of one job.

    Attributes:
        number: Hydra's, from 0.
        overrides: of this job.
        state: ``"running"``, ``"finished"``, ``"failed"`` or ``"skipped"``; ``"missing"`` before it began.
        folder: of its run, relative to the outputs; ``None`` until it is known.
        error: the last line of the error of a failed job.
        started: seconds since 1970; 0 before it began.
        seconds: how long it took; ``None`` while it runs.
    """

    number: int
    overrides: tuple[str, ...]
    state: str = "missing"
    folder: str | None = None
    error: str = ""
    started: float = 0.0
    seconds: float | None = None


@dataclass(frozen=True)
class Sweep:
    """The folder of a grid."""

    path: Path

    @classmethod
    def named(cls, outputs: Path, overrides: Sequence[str], name: str | None) -> "Sweep":
        """The folder for a grid of these overrides.

        Args:
            outputs: where runs lie.
            overrides: as on the command line, sweeps included.
            name: given by the user; ``None`` makes one of the swept keys and a hash of the overrides.
        """
        if name is None:
            swept = [text.lstrip("+").partition("=")[0] for text in overrides if _is_swept(text)]
            readable = "-".join(key.rpartition(".")[2].rpartition("@")[2] for key in swept)[:48] or "grid"
            name = f"{readable}-{sha256_of_json(sorted(overrides))[:8]}"
        return cls(outputs / SWEEPS / name)

    def begin(self, command: str, overrides: Sequence[str], jobs: Sequence[Sequence[str]] | None) -> None:
        """Record what is asked for; ``jobs`` is ``None`` where a sweeper decides on the jobs as it goes."""
        write_json(
            self.path / "sweep.json",
            {
                "command": command,
                "program": environment.program(),
                "overrides": list(overrides),
                "jobs": None if jobs is None else [list(job) for job in jobs],
                "started": round(time.time(), 6),
            },
        )

    @contextmanager
    def job(self, number: int, overrides: Sequence[str], outputs: Path) -> Iterator["RunningJob"]:
        """Record a job from its start to its end; a killed job remains ``"running"`` in the record."""
        running = RunningJob(self._job_file(number), tuple(overrides), outputs)
        running.write("running")
        try:
            yield running
        except BusyError:  # the other process writes the record of this job
            raise
        except SkippedError as error:
            running.write("skipped", error)
            raise
        except Exception as error:
            running.write("failed", error)
            raise
        running.write("finished")

    @property
    def begun(self) -> bool:
        """Whether this is the folder of a grid."""
        return (self.path / "sweep.json").is_file()

    def _job_file(self, number: int) -> Path:
        return self.path / "jobs" / f"{number:05d}.json"

    def failed_job(self) -> Job | None:
        """A job that has failed since this grid was last started."""
        since = float(self.content().get("started", 0.0))
        return next((job for job in self.recorded() if job.state == "failed" and job.started > since), None)

    def content(self) -> dict[str, Any]:
        """What :meth:`begin` recorded.

        Raises:
            UserError: if this is not the folder of a grid.
        """
        return read_json(self.path / "sweep.json")

    @property
    def program(self) -> list[str]:
        """What a user would start a job with; in a launcher's worker that is not the program of the process."""
        try:
            found = self.content().get("program")
        except UserError:
            found = None
        return list(map(str, found)) if isinstance(found, list) and found else environment.program()

    def recorded(self) -> Iterator[Job]:
        """The jobs that have begun, in order; a record that cannot be read is left out."""
        for path in sorted(self.path.glob("jobs/*.json")):
            with suppress(UserError, TypeError, ValueError):
                found = read_json(path)
                yield Job(
                    int(path.stem), tuple(map(str, found["overrides"])), str(found["state"]),
                    _inside(found.get("folder")), str(found.get("error", "")), float(found["started"]),
                    found.get("seconds"),
                )  # fmt: skip

    def runs(self) -> list[Path]:
        """The folders of the jobs' runs, as far as they have begun; none if this is not a grid's folder."""
        outputs = self.path.absolute().parent.parent
        folders = [outputs / job.folder for job in self.recorded() if job.folder] if self.begun else []
        return [folder for folder in folders if folder.is_dir()]

    def jobs(self) -> list[Job]:
        """All jobs: those that have begun, and those that are missing."""
        begun = {job.number: job for job in self.recorded()}
        planned = self.content().get("jobs") or []
        missing = {number: Job(number, tuple(map(str, overrides))) for number, overrides in enumerate(planned)}
        same = {
            n: job for n, job in begun.items() if not planned or missing.get(n, job).overrides == job.overrides
        }
        return [job for _, job in sorted((missing | same).items())]


class RunningJob:
    """The record of a job that this process runs."""

    def __init__(self, path: Path, overrides: tuple[str, ...], outputs: Path) -> None:
        self._path = path
        self._outputs = outputs
        self._started = time.time()
        self._content: dict[str, Any] = {
            "overrides": list(overrides), "host": platform.node(), "pid": os.getpid(),
            **({"slurm_job": job} if (job := environment.slurm_job()) else {}),
        }  # fmt: skip

    def runs_in(self, folder: Path) -> None:
        """Record the folder of the job's run."""
        self._content["folder"] = os.path.relpath(folder, self._outputs)
        self.write("running")

    def write(self, state: str, error: Exception | None = None) -> None:
        """Replace the record."""
        content = {**self._content, "state": state, "started": round(self._started, 6)}
        if state != "running":
            content["seconds"] = round(time.time() - self._started, 3)
        if error is not None:
            lines = str(error).strip().splitlines()
            content["error"] = shortened(lines[-1] if lines else type(error).__name__)
        write_json(self._path, content)


def _inside(folder: object) -> str | None:
    """A run's folder, relative to the outputs; ``None`` for one that would lie elsewhere."""
    if not isinstance(folder, str) or Path(folder).is_absolute() or ".." in Path(folder).parts:
        return None
    return folder


def _is_swept(override: str) -> bool:
    """Whether an override has several values; brackets and quotes are left to Hydra."""
    _, _, value = override.partition("=")
    return "," in value or value.startswith(("range(", "choice(", "glob(", "interval("))
