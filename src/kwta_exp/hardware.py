"""What the hardware can do, and how much of it this process may use.

No other module inspects the hardware. Callers write ``hardware.usable_cores()``, so that tests can replace it.
"""

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

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


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, or a MIG part of one, as the driver describes it; ``None`` for what it does not say.

    Attributes:
        name: such as ``"NVIDIA H200"``.
        memory: in bytes.
        compute_capability: such as ``"9.0"``.
        driver: its version.
    """

    name: str | None = None
    memory: int | None = None
    compute_capability: str | None = None
    driver: str | None = None


def nvidia_gpus() -> int:
    """The number of GPUs that the NVIDIA driver reports and ``CUDA_VISIBLE_DEVICES`` leaves.

    Does not initialise CUDA, which would forbid forks.
    """
    return len(_visible(_handles))


def gpu_entries() -> list[str]:
    """A value of ``CUDA_VISIBLE_DEVICES`` for each GPU that is visible to this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [
        str(number) if visible is None else visible.split(",")[number].strip()
        for number in range(nvidia_gpus())
    ]


def jobs_at_once(jobs_per_gpu: int) -> int:
    """How many runs this machine can take at once: on its GPUs, or one a core, each with 2 GiB of memory."""
    if gpus := nvidia_gpus():
        return gpus * jobs_per_gpu
    memory = available_memory()
    return max(1, min(usable_cores(), memory // _MEMORY_OF_A_RUN if memory else usable_cores()))


_MEMORY_OF_A_RUN = 2 << 30


def available_memory() -> int | None:
    """Bytes of memory that are available; ``None`` if that is unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(kibibytes) << 10 for kibibytes in found), None)


def first_gpu() -> Gpu | None:
    """The GPU that CUDA calls 0, found without initialising CUDA; ``None`` if there is none.

    By default CUDA puts the fastest GPU first, where the driver's management library counts by the bus: among
    unlike GPUs this is the right one with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, or where ``CUDA_VISIBLE_DEVICES``
    names it by UUID.
    """
    found = _visible(lambda nvml, visible: [_described(nvml, handle) for handle in _handles(nvml, visible)[:1]])
    return found[0] if found else None


def _visible(read: Callable[[Any, str | None], list[T]]) -> list[T]:
    """What ``read`` finds through the driver's library for a value of ``CUDA_VISIBLE_DEVICES``."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or (nvml := _nvml()) is None or nvml.nvmlInit_v2() != 0:
        return []
    try:
        return read(nvml, visible)
    finally:
        nvml.nvmlShutdown()


def _nvml() -> Any:
    """NVIDIA's management library, or ``None``."""
    try:
        return ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None


def _handles(nvml: Any, visible: str | None) -> list[ctypes.c_void_p]:
    """Handles of the GPUs that ``CUDA_VISIBLE_DEVICES`` leaves, in its order.

    As CUDA reads it: indices, or UUIDs that may be cut short, up to the first entry that is none or is
    repeated.
    """
    count = ctypes.c_uint(0)
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    everything: list[ctypes.c_void_p] = []
    for number in range(count.value):
        handle = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(handle)) == 0:
            everything.append(handle)
    if visible is None:
        return everything
    chosen: list[ctypes.c_void_p] = []
    for entry in visible.split(","):
        found = _handle_of(nvml, entry.strip(), everything)
        if found is None or found.value in {handle.value for handle in chosen}:
            break
        chosen.append(found)
    return chosen


def _handle_of(nvml: Any, entry: str, everything: list[ctypes.c_void_p]) -> ctypes.c_void_p | None:
    if entry.isdecimal():
        return everything[int(entry)] if int(entry) < len(everything) else None
    if entry.startswith("MIG-"):
        handle = ctypes.c_void_p()
        found = nvml.nvmlDeviceGetHandleByUUID(entry.encode(), ctypes.byref(handle)) == 0
        return handle if found else None
    named = [each for each in everything if (_text(nvml.nvmlDeviceGetUUID, each) or "").startswith(entry)]
    return named[0] if entry.startswith("GPU-") and len(named) == 1 else None


class _Memory(ctypes.Structure):
    """``nvmlMemory_t``, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _described(nvml: Any, handle: ctypes.c_void_p) -> Gpu:
    memory, major, minor = _Memory(), ctypes.c_int(), ctypes.c_int()
    has_memory = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
    capability = nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) == 0
    return Gpu(
        name=_text(nvml.nvmlDeviceGetName, handle),
        memory=memory.total if has_memory else None,
        compute_capability=f"{major.value}.{minor.value}" if capability else None,
        driver=_text(nvml.nvmlSystemGetDriverVersion),
    )


def _text(function: Any, *handle: ctypes.c_void_p) -> str | None:
    buffer = ctypes.create_string_buffer(96)
    failed = function(*handle, buffer, ctypes.c_uint(len(buffer)))
    return None if failed else buffer.value.decode(errors="replace")


def torch_has_cuda() -> bool:
    """Whether this build of torch can use the GPUs; initialises CUDA."""
    import torch

    return torch.cuda.is_available()


def cuda_versions() -> dict[str, str | int | None]:
    """The versions of the CUDA runtime and of cuDNN that torch uses."""
    import torch

    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
