"""How far a grid is: what is done, what runs, what failed and why, what is missing, and for how much longer."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kwta_exp.attempts import is_locked
from kwta_exp.errors import UserError
from kwta_exp.report.tabular import aligned
from kwta_exp.sweeps import SWEEPS, Job, Sweep

_ORDER = ("finished", "running", "failed", "skipped", "interrupted", "missing")
_EXPLAINED = {"interrupted": "killed or stopped; the grid's command continues them"}


def sweeps_in(folder: Path) -> list[Sweep]:
    """The grids at ``folder``: a grid's folder, or outputs that hold some; the latest first.

    Raises:
        UserError: if there is none.
    """
    at = [folder, *folder.glob("*"), *folder.glob(f"{SWEEPS}/*")]
    found = [sweep for sweep in map(Sweep, at) if sweep.begun]
    if not found:
        raise UserError(f"{folder}: no grid; expected outputs with a grid in {SWEEPS}/, or a grid's folder")
    return sorted(found, key=lambda sweep: float(sweep.content().get("started", 0.0)), reverse=True)


def jobs_of(sweep: Sweep) -> list[Job]:
    """The jobs; one that its record calls running, but whose run no process holds, is interrupted."""
    outputs = sweep.path.absolute().parent.parent
    return [
        replace(job, state="interrupted")
        if job.state == "running" and not (job.folder and is_locked(outputs / job.folder))
        else job
        for job in sweep.jobs()
    ]


def status(sweep: Sweep) -> str:
    """The state of a grid, as text."""
    content, jobs = sweep.content(), jobs_of(sweep)
    lines = [f"{sweep.path.name}: {content['command']}"]
    for state in _ORDER:
        if number := sum(job.state == state for job in jobs):
            more = f"  ({_EXPLAINED[state]})" if state in _EXPLAINED else ""
            lines.append(f"  {number:5} {state}{more}")
    if content.get("jobs") is None:
        lines.append("  (a sweeper decides on the jobs as it goes, so none is known to be missing)")
    if (left := _time_left(jobs)) is not None:
        lines.append(f"  about {_duration(left)} to go")
    shown = [job for job in jobs if job.state not in ("finished", "missing")]
    if shown:
        constant = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
        rows = [
            [f"#{job.number}", job.state, " ".join(o for o in job.overrides if o not in constant), job.error]
            for job in shown
        ]
        lines += ["", *aligned([["job", "state", "overrides", "cause"], *rows])]
    return "\n".join(lines)


def _time_left(jobs: Sequence[Job]) -> float | None:
    """Seconds, from the mean of the finished jobs and the number that run at once; ``None`` if nothing is left
    or nothing was measured. A job that was finished before this grid takes under a second and is not counted.
    """
    took = [job.seconds for job in jobs if job.state == "finished" and job.seconds and job.seconds >= 1]
    left = sum(job.state in ("missing", "interrupted") for job in jobs)
    running = sum(job.state == "running" for job in jobs)
    if not took or not left + running:
        return None
    mean = sum(took) / len(took)
    return mean * (left + running / 2) / max(1, running)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
