"""How a command ends at the shell: one message for a mistake, an exit status, and no needless traceback."""

import io
import logging
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode

from kwta_exp.errors import PrintableFormatter, UserError, printable, shortened
from kwta_exp.interruption import StoppedError, heeded

INTERRUPTED = 130
"""The exit status after Ctrl-C: 128 and the number of the signal, as shells count."""

_FULL_ERROR = "HYDRA_FULL_ERROR"
_TRACEBACK_WANTED = os.environ.get(_FULL_ERROR) == "1"
_HINT = f"\nSet the environment variable {_FULL_ERROR}=1 for a complete stack trace."


@contextmanager
def at_the_shell(explained: Callable[[Exception], str | None] = lambda error: None) -> Iterator[None]:
    """Run a whole command in this context.

    A user's mistake ends in one message on stderr and exit status 1, Ctrl-C in one line and
    :data:`INTERRUPTED`. A closed pipe (``| head``) or a full device does not stop the command and leaves no
    traceback. Characters that the terminal cannot show are escaped. Any other error is a bug and keeps its
    traceback; with ``HYDRA_FULL_ERROR=1`` in the environment every error does.

    Args:
        explained: returns a better message for an error, or ``None`` to keep the error's own.
    """
    calm_streams()
    os.environ[_FULL_ERROR] = "1"  # Hydra raises instead of printing
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted; the same command continues")
        sys.exit(INTERRUPTED)
    except StoppedError as stopped:
        _say(f"stopped by {signal.Signals(stopped.number).name}; the same command continues")
        raise
    except BrokenPipeError:
        pass  # from print: the reader has closed the pipe
    except Exception as error:
        if _TRACEBACK_WANTED:
            raise
        message = explained(error)
        if message is None and isinstance(error, UserError | CompactHydraException):
            message = str(error)
        if message is None:
            raise
        _say(message + _HINT)
        sys.exit(1)
    finally:
        _flush_for_good()


@contextmanager
def in_a_job() -> Iterator[None]:
    """Run a job of Hydra's in this context: signals are heeded, and a mistake ends in its message alone.

    Hydra would print all overrides before it. In a grid the error is raised, so that the other jobs run: as it
    is, or as one that a launcher's worker can send to the launcher.
    """
    calm_streams()
    try:
        with heeded():
            yield
    except Exception as error:
        in_a_grid = HydraConfig.get().mode == RunMode.MULTIRUN
        if in_a_grid and not _can_be_sent(error):
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        if _TRACEBACK_WANTED or in_a_grid or not isinstance(error, CompactHydraException):
            raise
        end_with(error)


def _can_be_sent(error: Exception) -> bool:
    """Whether an error survives pickling; those of some libraries do not."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # whatever its methods raise
        return False


def end_with(error: Exception) -> NoReturn:
    """End the command with the message of a user's mistake, on stderr, and exit status 1."""
    _say(str(error) + _HINT)
    raise SystemExit(1) from None


class JobFormatter(PrintableFormatter):
    """The message alone, printable; in a grid each line begins with the job's number, ``#3``, as Hydra counts.

    Args:
        job: the number; ``None`` outside a grid.
    """

    def __init__(self, job: int | None = None) -> None:
        super().__init__("%(message)s")
        self._prefix = "" if job is None else f"#{job} "

    def format(self, record: logging.LogRecord) -> str:
        """The lines of a record; lines of another job may come between two records, not within one."""
        return "\n".join(self._prefix + line for line in super().format(record).split("\n"))


def calm_streams() -> None:
    """Print and log without errors for unencodable characters or a closed terminal."""
    logging.raiseExceptions = False  # else a handler that cannot write prints a traceback for each line
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say(message: str) -> None:
    """Print one message to stderr, with control characters escaped and long lines shortened."""
    with suppress(OSError):
        print(shortened(printable(message)), file=sys.stderr)


def _flush_for_good() -> None:
    """Flush now: an error at exit would make Python print a traceback and change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
