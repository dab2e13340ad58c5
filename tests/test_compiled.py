"""Kernels on several threads: each part once, failures reported, with and without GNU's OpenMP library."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from kwta_exp import compiled
from kwta_exp.compiled import SMALL, each_part, jit, on_threads


@jit
def count(first, last, visits):  # type: ignore[no-untyped-def]
    for row in range(first, last):
        visits[row, 0] += 1


@jit
def count_parts(rows, parts, threads, *arguments):  # type: ignore[no-untyped-def]
    return each_part(count, rows, parts, threads, arguments)


@jit
def fail_at(first, last, row):  # type: ignore[no-untyped-def]
    if first <= row < last:
        raise MemoryError


@jit
def fail_at_parts(rows, parts, threads, *arguments):  # type: ignore[no-untyped-def]
    return each_part(fail_at, rows, parts, threads, arguments)


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_each_row_is_in_one_part(rows: int, threads: int) -> None:
    visits = np.zeros((rows, 1), np.int64)
    for _ in range(50):
        on_threads(count_parts, (rows, SMALL), threads, visits)
    assert (visits == 50).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_kernel_that_fails_is_an_error_of_memory(threads: int) -> None:
    for row in range(6):
        with pytest.raises(MemoryError, match="kernel"):
            on_threads(fail_at_parts, (6, SMALL), threads, row)
    on_threads(fail_at_parts, (6, SMALL), threads, 6)


WITHOUT_OPENMP = """
import ctypes, threading
import torch
loaded, started = ctypes.CDLL, []
def refuse(name, *args, **kwargs):
    if name == "libgomp.so.1":
        raise OSError(name)
    return loaded(name, *args, **kwargs)
ctypes.CDLL = refuse
start = threading.Thread.start
def counted(thread):
    started.append(thread)
    start(thread)
threading.Thread.start = counted
from kwta_exp.activations import kwta
torch.set_num_threads(3)
x = torch.randn(7, 65536)
kept = kwta(x, 0.125)
assert len(started) == 2, started
assert torch.equal(kept, x.where(x >= x.topk(8192).values[:, -1:], 0))
"""


def test_without_gnus_openmp_threads_of_python_do_the_work() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_OPENMP], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_an_interruption_on_threads_of_python_is_raised_when_all_have_ended() -> None:
    caller, ended = threading.get_ident(), []

    def task(_: int) -> None:
        if threading.get_ident() == caller:
            raise KeyboardInterrupt
        time.sleep(0.2)
        ended.append(True)

    def work(rows: int, parts: int, threads: int) -> int:
        compiled._new_threads(task, 0, threads, 0)
        assert ended == [True] * (threads - 1)
        return parts

    with pytest.raises(KeyboardInterrupt):
        on_threads(work, (3, SMALL), 3)
    assert not compiled._interruptions


def test_machine_code_is_compiled_anew_when_its_generators_change(monkeypatch: pytest.MonkeyPatch) -> None:
    @jit
    def one(x):  # type: ignore[no-untyped-def]
        return x + 1

    def another(x):  # type: ignore[no-untyped-def]
        return x + 1

    monkeypatch.setattr(compiled, "_GENERATORS", "changed")
    stamps = [kernel._cache._cache_file._source_stamp for kernel in (one, jit(another))]
    assert stamps[0][0] == stamps[1][0]
    assert stamps[0] != stamps[1]
