"""One module queries the hardware; a process uses no more cores than it may."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from kwta_exp import hardware
from kwta_exp.hardware import computes_in_bfloat16, has_matrix_units
from kwta_exp.runtime import SPINS, Runtime, let_idle_threads_sleep

CPU = torch.device("cpu")
SOURCE = Path(hardware.__file__).parent


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path / "mounted")


def groups(tmp_path: Path, own: str, files: dict[str, str]) -> None:
    (tmp_path / "cgroup").write_text(own)
    for name, content in files.items():
        path = tmp_path / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_without_limits_all_allowed_cores_are_used() -> None:
    assert hardware.usable_cores() == 8


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 3),  # two and a half
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),  # the parent's limit
        ("0::/a/b\n", {"a/b/cpu.max": "100000 50000\n", "a/cpu.max": "300000 100000\n"}, 2),
        ("0::/a\n", {"b/cpu.max": "100000 100000\n"}, 8),  # not a sibling's
        ("0::/../../host/job\n", {"cpu.max": "400000 100000\n"}, 4),  # seen from a container
        ("4:cpu,cpuacct:/job\n", {"cpu,cpuacct/job/cpu.cfs_quota_us": "300000\n",
                                  "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}, 3),
        ("4:cpu:/job/step\n", {"cpu/job/cpu.cfs_quota_us": "150000\n", "cpu/job/cpu.cfs_period_us": "100000\n",
                               "cpu/job/step/cpu.cfs_quota_us": "-1\n",
                               "cpu/job/step/cpu.cfs_period_us": "100000\n"}, 2),
        ("4:cpu:/docker/1a2b\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ("2:memory:/\n1:cpuset:/\n", {"cpu.max": "100000 100000\n"}, 8),
        ("1:cpu:/\n0::/\n", {"unified/cpu.max": "500000 100000\n", "cpu/cpu.cfs_quota_us": "600000\n",
                             "cpu/cpu.cfs_period_us": "100000\n"}, 5),
    ],
)  # fmt: skip
def test_cgroup_quotas_limit_the_cores(own: str, files: dict[str, str], cores: int, tmp_path: Path) -> None:
    groups(tmp_path, own, files)
    assert hardware.usable_cores() == cores


@pytest.mark.parametrize(
    ("granted", "cores"), [("3", 3), ("1", 1), ("64", 8), ("0", 8), ("-2", 8), ("2.5", 8), ("", 8), ("many", 8)]
)
def test_slurm_cpus_per_task_limits_the_cores(
    granted: str, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", granted)
    assert hardware.usable_cores() == cores


def test_the_smallest_limit_applies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    groups(tmp_path, "0::/\n", {"cpu.max": "300000 100000\n"})
    assert hardware.usable_cores() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    assert hardware.usable_cores() == 1


def test_a_run_uses_one_thread_per_usable_core_and_its_name_depends_on_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for cores in (3, 5):
        monkeypatch.setattr(hardware, "usable_cores", lambda cores=cores: cores)
        assert Runtime(accelerator="cpu").resolved_threads == cores
        assert Runtime(accelerator="cpu").identity()["threads"] == cores
    assert Runtime(accelerator="cpu", threads=2).identity()["threads"] == 2


@pytest.mark.parametrize(("given", "spins"), [
    ({}, SPINS), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "active"}, None),
])  # fmt: skip
def test_idle_threads_stop_spinning_soon_unless_the_user_sets_otherwise(
    given: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    let_idle_threads_sleep()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize(("module", "words"), [("command", []), ("cli", ["list"])])
def test_every_command_sets_the_spin_count_before_importing_torch(
    module: str, words: list[str], tmp_path: Path
) -> None:
    """OpenMP reads it once, as torch is loaded."""
    code = f"""if True:
        import sys
        import kwta_exp.{module} as it
        sys.argv[1:] = {words}
        it.let_idle_threads_sleep = lambda: sys.exit(4 if "torch" in sys.modules else 3)
        it.main()
        """
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 3


def test_a_gpu_is_used_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, expected in ((0, "cpu"), (2, "cuda")):
        monkeypatch.setattr(hardware, "nvidia_gpus", lambda gpus=gpus: gpus)
        assert Runtime().resolved_accelerator == expected
    for hidden in ("", "-1"):
        monkeypatch.undo()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert hardware.nvidia_gpus() == 0


AVX2 = {"avx2": True}
BF16 = AVX2 | {"avx512_bf16": True}
AMX = BF16 | {"amx_bf16": True}


@pytest.mark.parametrize(
    ("can", "limit", "bfloat16", "matrix_units"),
    [
        (AVX2, None, False, False),
        (BF16, None, True, False),
        (AMX, None, True, True),
        (AMX, "ALL", True, True),
        (AMX, "AVX512_CORE_AMX", True, True),
        (AMX, "AVX512_CORE_BF16", True, False),
        (AMX, "avx512_core", False, False),
        (AMX, "AVX2", False, False),
        (AVX2, "AVX512_CORE_AMX", False, False),
    ],
)
def test_bfloat16_and_amx_depend_on_the_cpu_and_the_isa_limit(
    can: dict[str, bool], limit: str | None, bfloat16: bool, matrix_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(can))
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert computes_in_bfloat16(CPU) == bfloat16
    assert has_matrix_units(CPU) == matrix_units
    assert has_matrix_units(torch.device("cuda"))


def test_only_hardware_py_inspects_the_hardware() -> None:
    asks = re.compile(
        r"get_capabilities|cpu_count|sched_getaffinity|cuda\.is_available|is_bf16_supported|libnvidia|/sys/fs"
    )
    asking = {path.name for path in SOURCE.rglob("*.py") if asks.search(path.read_text())}
    assert asking == {"hardware.py"}
