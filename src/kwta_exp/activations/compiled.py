"""Numba's kernels for CPUs: compiled at the first call, run on the threads that torch has."""

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from numba import njit

SMALL = 1 << 16
"""Values up to which one thread does all: starting another takes longer."""


def on_threads(work: Callable[..., None], shape: Sequence[int], threads: int, *arguments: Any) -> None:
    """Call ``work(first, last, *arguments)`` on parts of the rows at once, on ``threads`` threads at most.

    ``work`` lets go of the interpreter.
    """
    rows = shape[0]
    threads = max(1, min(threads, rows, rows * shape[1] // SMALL))
    edges = [rows * part // threads for part in range(threads + 1)]
    parts = iter(list(pairwise(edges)))
    failed: list[BaseException] = []

    def member(_: Any = None) -> None:
        for first, last in parts:
            try:
                work(first, last, *arguments)
            except BaseException as error:
                failed.append(error)

    if threads == 1:
        member()
    else:
        _team(member, threads)
    if failed:
        raise failed[0]


def _team(member: Callable[[Any], None], threads: int) -> None:
    """Call ``member`` on each of several threads at once: those of torch, where they are OpenMP's.

    They wait for work spinning, for milliseconds after every operation, so that on a machine with as many
    cores as threads one of our own would have to fight them for its core.
    """
    if _gomp is not None:
        ended = threading.Event()
        caller = threading.get_ident()

        def noted(_: Any) -> None:
            member(None)
            if threading.get_ident() == caller:
                ended.set()

        _gomp.GOMP_parallel(_MEMBER(noted), None, threads, 0)
        if not ended.is_set():  # ctypes drops what a signal's handler raises between the lines of a callback
            raise KeyboardInterrupt
        return
    others = [threading.Thread(target=member, args=(None,)) for _ in range(threads - 1)]
    for other in others:
        other.start()
    member(None)
    for other in others:
        other.join()


_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _loaded_gomp() -> ctypes.CDLL | None:
    """The OpenMP that torch has loaded, if it is GNU's."""
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except (OSError, AttributeError):
        return None


_gomp = _loaded_gomp()


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call; keep the machine code beside its source or, if that is read-only, nowhere."""
    try:
        compiled = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder that can be written to
        compiled = njit(nogil=True)(function)
    return compiled
