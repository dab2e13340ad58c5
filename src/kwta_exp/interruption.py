"""Signals that ask a run to leave: it saves its state first, wherever that takes no longer than a step.

Schedulers announce a preemption or the end of a time limit by SIGTERM or SIGUSR2, and kill the process some
time later. Libraries such as submitit have handlers of their own, which requeue the job; they are called after
the state was saved.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ASKED = (signal.SIGTERM, signal.SIGUSR2) if hasattr(signal, "SIGUSR2") else (signal.SIGTERM,)

PATIENCE = 20.0
"""Seconds after which the run leaves without saving: SLURM and Kubernetes kill it after 30."""


class StoppedError(SystemExit):
    """A signal ended the run; the exit status is 128 and its number, as shells count."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class _State:
    """What this process was asked for, and who is called for each signal."""

    asked: int | None = None
    saves: bool = False
    timer: bool = False
    before: dict[int, Any] = {}  # noqa: RUF012 - there is one for the process


@contextmanager
def heeded() -> Iterator[None]:
    """Take over SIGTERM and SIGUSR2 in the main thread; elsewhere nothing changes.

    A signal that nobody handled before ends the run with :class:`StoppedError`. SIGUSR2 is taken over only
    where somebody handles it.
    """
    if threading.current_thread() is not threading.main_thread() or _State.before:
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _ASKED}
    taken = {
        number: old
        for number, old in before.items()
        if callable(old) or (number == signal.SIGTERM and old is not signal.SIG_IGN)
    }
    _State.before = taken
    try:
        for number in taken:
            signal.signal(number, _note)
        yield
    finally:
        _stop_timer()
        for number, old in taken.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)
        _State.before, _State.asked = {}, None


@contextmanager
def saving(save: Callable[[], object] | None = None) -> Iterator[Callable[[], None]]:
    """A loop that can leave after each step.

    Args:
        save: writes the state; ``None`` where each step does so itself.

    Yields:
        A function to call after each step. Where a signal has come, it saves, and the run leaves.
    """

    def leave_if_asked() -> None:
        if _State.asked is not None:
            if save is not None:
                save()
            _leave()

    outer, _State.saves = _State.saves, True
    try:
        yield leave_if_asked
    finally:
        _State.saves = outer


def _note(number: int, frame: FrameType | None) -> None:
    """Remember the signal if a loop will look, else leave at once."""
    _State.asked = number
    if not _State.saves:
        _leave()
    elif signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL)[0] == 0:
        _State.timer = True
        signal.signal(signal.SIGALRM, lambda *_: _leave())
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)


def _stop_timer() -> None:
    if _State.timer:
        _State.timer = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _leave() -> None:
    """Call whoever handled the signal before; if nobody did, end the run."""
    _stop_timer()
    number, _State.asked = _State.asked, None
    assert number is not None
    before = _State.before.get(number)
    if callable(before):
        before(number, sys._getframe())
    else:
        raise StoppedError(number)
