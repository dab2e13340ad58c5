"""The C library's memory allocator, set for tensors of the same sizes at every step."""

import ctypes
import sys


def keep_freed_memory() -> bool:
    """Let the process keep freed memory and use it again, instead of mapping pages anew.

    By default GNU's C library maps each block of 32 MiB or more anew, and returns smaller ones to the system
    now and then. Such an output costs a page fault per 4 KiB, which takes longer than most layers. The call
    concerns the whole process. Free memory goes back to the system only when the process ends.

    Returns:
        Whether it does so; False with a C library other than GNU's, where nothing changes.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h
