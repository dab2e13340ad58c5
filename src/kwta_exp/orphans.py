"""A worker whose launcher was killed leaves as well: its grid may be started again at any time."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kwta_exp.interruption import PATIENCE, StoppedError

_watched: list[int] = []
"""The launcher's process number, once it is watched."""


@contextmanager
def leaving_with_launcher() -> Iterator[None]:
    """Run a job in a launcher's worker. Once the launcher is gone, the job saves its state and the worker ends.

    Without this, a worker would go on with the jobs that it was sent in advance.
    """
    if not _watched:
        _watched.append(os.getppid())
        threading.Thread(target=_watch, args=_watched, daemon=True).start()
    try:
        yield
    except StoppedError as stopped:
        if _is_orphan():
            os._exit(int(str(stopped.code)))
        raise


def _is_orphan() -> bool:
    return os.getppid() != _watched[0]


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * PATIENCE)
    os._exit(128 + signal.SIGTERM)
