"""Freed memory is kept and used again. In new processes, because the setting cannot be undone."""

import ctypes
import os
import subprocess
import sys

import pytest

from kwta_exp import allocator

FAULTS = """
import ctypes, resource, sys
from kwta_exp.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
def filled():
    block = c.malloc(ctypes.c_size_t(64 << 20))
    ctypes.memset(block, 1, 64 << 20)
    c.free(ctypes.c_void_p(block))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = filled()
print(filled() - first)
"""

gnu = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
    reason="the C library is not GNU's",
)


def faults(setting: str) -> int:
    """The page faults of filling a block of the size of one just freed."""
    command = [sys.executable, "-c", FAULTS, setting]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)


@gnu
def test_freed_memory_is_used_again() -> None:
    assert faults("default") > 20  # 32 pages of 2 MiB, or many of 4 KiB
    assert faults("keep") <= 5


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()


@gnu
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_a_users_own_setting_is_kept(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1000000")
    assert not allocator.keep_freed_memory()
