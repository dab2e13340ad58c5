"""The attempts at a run: ``attempts.jsonl``, one line for each, and how far a run is."""

import os
import platform
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kwta_exp import environment
from kwta_exp.errors import UserError, shortened
from kwta_exp.storage import read_lines, write_lines

FILE = "attempts.jsonl"

State = Literal["finished", "running", "failed", "interrupted", "damaged"]
"""``interrupted`` was stopped or killed; the same command continues it. ``damaged`` cannot be read."""

_MAX_TRACEBACK = 20_000


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        state: of the run.
        cause: the last line of the error, if it failed.
        seconds: of all attempts that ended, if it is finished.
        attempts: the lines of the file.
    """

    state: State
    cause: str
    seconds: float | None
    attempts: list[dict[str, Any]]


@contextmanager
def attempt(folder: Path, command: str) -> Iterator[None]:
    """Record an attempt at the run in ``folder``: its start at once, and how it ends.

    A process that is killed leaves an attempt without an end.
    """
    path = folder / FILE
    earlier = read(folder)
    started = time.time()
    line = {
        "command": command, "host": platform.node(), "pid": os.getpid(),
        **({"slurm_job": job} if (job := environment.slurm_job()) else {}), "started": round(started, 3),
    }  # fmt: skip
    write_lines(path, [*earlier, line])
    try:
        yield
    except BaseException as error:
        failed = isinstance(error, Exception)
        _end(path, earlier, line, "failed" if failed else "interrupted", error if failed else None)
        raise
    _end(path, earlier, line, "finished", None)


def _end(
    path: Path, earlier: list[dict[str, Any]], line: dict[str, Any], state: str, error: BaseException | None
) -> None:
    ended: dict[str, Any] = {"ended": state, "seconds": round(time.time() - line["started"], 3)}
    if error is not None:
        ended["error"] = shortened(f"{type(error).__name__}: {error}")
        ended["traceback"] = "".join(traceback.format_exception(error))[-_MAX_TRACEBACK:]
    try:
        write_lines(path, [*earlier, {**line, **ended}])
    except UserError:
        if error is None:  # else the error itself says more: a full disk, a deleted folder
            raise


def read(folder: Path) -> list[dict[str, Any]]:
    """The attempts so far; none if the file is missing or damaged, since nothing depends on them."""
    try:
        return read_lines(folder / FILE)
    except UserError:
        return []


def state_of(folder: Path, finished: bool) -> Progress:
    """How far the run in ``folder`` is.

    Args:
        folder: of the run.
        finished: whether it has results.
    """
    attempts = read(folder)
    last = attempts[-1] if attempts else {}
    ended = last.get("ended")
    if is_locked(folder):
        return Progress("running", "", None, attempts)
    if ended == "failed":
        error = str(last.get("error", "")).strip()
        return Progress("failed", error.splitlines()[-1] if error else "", None, attempts)
    if finished and ended in ("finished", None):
        seconds = sum(each.get("seconds", 0.0) for each in attempts)
        return Progress("finished", "", seconds if attempts else None, attempts)
    return Progress("interrupted", "", None, attempts)


def is_locked(folder: Path) -> bool:
    """Whether a process holds the run's lock; on a shared file system also one of another machine's."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        descriptor = os.open(lock_of(folder), os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def lock_of(folder: Path) -> Path:
    """The lock of a run: beside its folder, so that it stays in place when the folder is set aside."""
    return folder.with_name(f".{folder.name}.lock")
