"""What a command owes the shell that called it: one message for a mistake, an exit status, and no noise."""

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode

from kwta_exp.errors import PrintableFormatter, UserError, printable, shortened

INTERRUPTED = 130
"""The exit status after Ctrl-C: 128 and the number of the signal, as shells count."""

_FULL_ERROR = "HYDRA_FULL_ERROR"
_TRACEBACK_WANTED = os.environ.get(_FULL_ERROR) == "1"
_HINT = f"\nSet the environment variable {_FULL_ERROR}=1 for a complete stack trace."


@contextmanager
def at_the_shell(explained: Callable[[Exception], str | None] = lambda error: None) -> Iterator[None]:
    """Wrap all that a command does.

    A mistake ends as one message on stderr and exit status 1, Ctrl-C as one line and
    :data:`INTERRUPTED`. A reader that went away (``| head``) or a full device stops neither the command
    nor ends in a traceback, and characters that the terminal cannot show are escaped. Any other error is a
    bug and keeps its traceback; with ``HYDRA_FULL_ERROR=1`` in the environment every error does.

    Args:
        explained: a better message for an error, or ``None`` to have its own.
    """
    calm_streams()
    os.environ[_FULL_ERROR] = "1"  # Hydra raises instead of printing
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted; the same command continues")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        pass  # from print: nobody reads on
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
    """Wrap what Hydra calls: a mistake in a single run leaves as its message alone.

    Hydra would put all overrides before it. In a grid the error stays what it is, so that the other jobs
    go on.
    """
    calm_streams()
    try:
        yield
    except CompactHydraException as error:
        if _TRACEBACK_WANTED or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        _say(str(error) + _HINT)
        raise SystemExit(1) from None


class JobFormatter(PrintableFormatter):
    """The message alone, printable, after the job's number in a grid: ``#3``, as Hydra counts them.

    Args:
        job: the number; ``None`` outside a grid.
    """

    def __init__(self, job: int | None = None) -> None:
        super().__init__("%(message)s" if job is None else f"#{job} %(message)s")


def calm_streams() -> None:
    """Let no character and no closed terminal disturb what prints or logs."""
    logging.raiseExceptions = False  # a handler that cannot write would print a traceback for each line
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say(message: str) -> None:
    """One message on stderr, its control characters escaped and its lines of bearable length."""
    with suppress(OSError):
        print(shortened(printable(message)), file=sys.stderr)


def _flush_for_good() -> None:
    """Flush now: what fails at exit, Python reports at length and with a status of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
