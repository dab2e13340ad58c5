"""One GPU for each process that runs jobs of a grid beside others on the same machine."""

import os
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from kwta_exp import hardware

_held: list[FileLock] = []
"""The slot of this process. A process that dies releases it."""


def take_gpu(jobs_per_gpu: int) -> None:
    """Leave this process one of the visible GPUs, for all its jobs: CUDA cannot change it later.

    Processes take free GPUs first, then the second slot of each, up to ``jobs_per_gpu``. If other programs hold
    all slots, a GPU is taken all the same.

    Args:
        jobs_per_gpu: how many processes may share a GPU.
    """
    gpus = hardware.gpu_entries()
    if _held or len(gpus) < 2:
        return
    folder = Path(tempfile.gettempdir()) / f"kwta_exp-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for turn in range(jobs_per_gpu):
        for gpu in gpus:
            lock = FileLock(folder / f"{gpu}-{turn}.lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                continue
            _held.append(lock)
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            return
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[os.getpid() % len(gpus)]
