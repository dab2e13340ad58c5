"""What the hardware can do, and how much of it this process may use.

No other module inspects the hardware. Callers write ``hardware.usable_cores()``, so that tests can replace it.
"""

import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")

_WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
_WITHOUT_AMX = {*_WITHOUT_BFLOAT16, "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"}


def computes_in_bfloat16(device: "torch.device") -> bool:
    """Whether the device has instructions for bfloat16, instead of emulating it.

    ``ONEDNN_MAX_CPU_ISA``, which limits the instructions of a CPU's convolutions, is respected.
    """
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16")) and _isa_limit() not in _WITHOUT_BFLOAT16


def has_matrix_units(device: "torch.device") -> bool:
    """Whether the device has matrix units: any GPU, or a CPU with AMX in bfloat16."""
    import torch

    if device.type != "cpu":
        return True
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) and _isa_limit() not in _WITHOUT_AMX


def _isa_limit() -> str:
    return os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()


def usable_cores() -> int:
    """The number of CPU cores that this process may use, at least 1.

    The smallest of: the cores in its affinity mask, the CPU quotas of its cgroups (rounded up), and
    ``SLURM_CPUS_PER_TASK``.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    limits = [math.ceil(quota) for quota in _cgroup_quotas()]
    limits += [int(granted)] if granted.isdecimal() and int(granted) > 0 else []
    return max(1, min([allowed, *limits]))


def _cgroup_quotas() -> Iterator[float]:
    """The quota, in cores, of each cgroup above this process that has one."""
    try:
        lines = _CGROUP.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounts, read = ("", "unified"), _quota
        elif "cpu" in controllers.split(","):
            mounts, read = (controllers, "cpu"), _quota_v1
        else:
            continue
        inside = Path(*(part for part in Path(path).parts if part not in ("/", "..")))
        for mount in mounts:
            # In a container the path may be the host's, so missing folders are skipped, up to the mount.
            for group in (inside, *inside.parents):
                if quota := read(_CGROUPS / mount / group):
                    yield quota


def _quota(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _quota_v1(group: Path) -> float | None:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text())
        return quota / int((group / "cpu.cfs_period_us").read_text()) if quota > 0 else None
    except (OSError, ValueError):
        return None


def nvidia_gpus() -> int:
    """The number of GPUs that the NVIDIA driver reports. Does not initialise CUDA, which would forbid forks."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return 0
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return 0
    nvml.nvmlShutdown()
    return count.value


def torch_has_cuda() -> bool:
    """Whether this build of torch can use the GPUs; initialises CUDA."""
    import torch

    return torch.cuda.is_available()
