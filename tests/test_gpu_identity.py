"""What a run says of its GPU, read from a fake of NVIDIA's library, and what it makes deterministic."""

import ctypes
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kwta_exp import environment, hardware, runtime
from kwta_exp.config import CommandLine
from kwta_exp.errors import UserError
from kwta_exp.hardware import Gpu, first_gpu, nvidia_gpus
from kwta_exp.plan import Plan
from kwta_exp.runtime import Runtime
from kwta_exp.settings import EvaluationSettings

A100, H200 = "NVIDIA A100-SXM4-80GB", "NVIDIA H200"
PART = "NVIDIA A100-SXM4-80GB MIG 1g.10gb"
UUIDS = ["GPU-aa11-0", "GPU-aa22-1", "GPU-bb33-2"]


class FakeNVML:
    """Three GPUs and a MIG part of the first, with the library's functions."""

    def __init__(self) -> None:
        self.names = {100: A100, 101: A100, 102: H200, 200: PART}
        self.open = 0
        self.broken: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in self.broken:
            return lambda *rest: 999
        return object.__getattribute__(self, name)

    def nvmlInit_v2(self) -> int:  # noqa: N802
        self.open += 1
        return 0

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 3
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, number: ctypes.c_uint, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 100 + number.value
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 200
        return 0 if uuid == b"MIG-cc44" else 6

    def nvmlDeviceGetUUID(self, handle: ctypes.c_void_p, text: Any, length: ctypes.c_uint) -> int:  # noqa: N802
        text.value = UUIDS[(handle.value or 0) - 100].encode()
        return 0

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p, text: Any, length: ctypes.c_uint) -> int:  # noqa: N802
        text.value = self.names[handle.value or 0].encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:  # noqa: N802
        memory._obj.total = 80 * 2**30
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: ctypes.c_void_p, major: Any, minor: Any) -> int:  # noqa: N802
        major._obj.value, minor._obj.value = (9, 0) if self.names[handle.value or 0] == H200 else (8, 0)
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, length: ctypes.c_uint) -> int:  # noqa: N802
        text.value = b"580.65.06"
        return 0


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNVML]:
    fake = FakeNVML()
    monkeypatch.setattr(hardware, "_nvml", lambda: fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield fake
    assert fake.open == 0  # whatever was opened was closed


@pytest.mark.parametrize(
    ("visible", "count", "name"),
    [
        (None, 3, A100),
        ("", 0, None),
        ("-1", 0, None),
        ("2", 1, H200),
        ("2,0", 2, H200),
        (" 1 , 2 ", 2, A100),
        ("0,7,2", 1, A100),  # up to the first that is none
        ("7", 0, None),
        ("0,0", 1, A100),
        ("2,-1,0", 1, H200),
        ("GPU-bb33-2", 1, H200),
        ("GPU-bb", 1, H200),
        ("GPU-aa", 0, None),  # of two
        ("GPU-bb33-2,GPU-aa11", 2, H200),
        ("MIG-cc44", 1, PART),
        ("MIG-none", 0, None),
        ("nonsense", 0, None),
    ],
)
def test_cuda_visible_devices_chooses_among_the_gpus(
    visible: str | None, count: int, name: str | None, nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvidia_gpus() == count
    gpu = first_gpu()
    assert (gpu.name if gpu else None) == name


def test_a_gpu_is_described_as_far_as_the_driver_does(nvml: FakeNVML) -> None:
    assert first_gpu() == Gpu(A100, 80 * 2**30, "8.0", "580.65.06")
    nvml.broken = {"nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCudaComputeCapability"}
    assert first_gpu() == Gpu(driver="580.65.06")
    nvml.broken = {"nvmlDeviceGetCount_v2"}
    assert nvidia_gpus() == 0
    assert first_gpu() is None
    nvml.broken = {"nvmlInit_v2"}
    assert nvidia_gpus() == 0


def test_a_machine_without_the_library_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_nvml", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert nvidia_gpus() == 0
    assert first_gpu() is None


def test_runs_on_unlike_gpus_have_different_identities(nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a100 = Runtime().identity()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert Runtime().identity() == on_a100 | {"gpu": H200}
    assert Runtime(deterministic=True).identity() == on_a100 | {"gpu": H200, "deterministic": True}
    assert on_a100["gpu"] == A100
    assert on_a100["threads"] is None


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_identity_of_a_cpu_run_depends_on_no_gpu(nvml: FakeNVML, deterministic: bool) -> None:
    """The names of earlier runs stay as they are."""
    assert Runtime(accelerator="cpu", threads=2, deterministic=deterministic).identity() == {
        "accelerator": "cpu", "devices": 1, "precision": "32-true", "channels_last": False, "compile": False,
        "threads": 2,
    }  # fmt: skip


def test_the_environment_of_a_run_names_its_gpu_and_the_software_below_torch(nvml: FakeNVML) -> None:
    described = environment.describe("run.py", "cuda:0", Runtime().identity())
    assert described["gpu"] == {
        "name": A100, "memory": 80 * 2**30, "compute_capability": "8.0", "driver": "580.65.06",
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip
    assert "gpu" not in environment.describe("run.py", "cpu", Runtime(accelerator="cpu").identity())


def test_a_run_that_uses_another_gpu_than_its_name_says_warns(
    nvml: FakeNVML, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        runtime._compare_names(A100)
        assert not caplog.text
        runtime._compare_names(H200)
    assert f"named after a {A100} but uses a {H200}; among unlike GPUs set CUDA_DEVICE_ORDER" in caplog.text


@pytest.fixture
def _algorithms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)


def states() -> tuple[bool, bool, bool, str | None]:
    return (
        torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )  # fmt: skip


@pytest.mark.usefixtures("_algorithms")
def test_a_deterministic_run_on_a_gpu_sets_every_library(
    nvml: FakeNVML, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next job of the process resets them."""
    torch.backends.cudnn.benchmark = True
    Runtime(deterministic=True)._set_algorithms()
    assert states() == (True, True, False, ":4096:8")
    Runtime()._set_algorithms()
    assert states() == (False, False, False, ":4096:8")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    Runtime(deterministic=True)._set_algorithms()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with pytest.raises(UserError, match=r"runtime\.deterministic=True: .*CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        Runtime(deterministic=True)._set_algorithms()


@pytest.mark.usefixtures("_algorithms")
def test_deterministic_changes_nothing_on_a_cpu() -> None:
    for deterministic in (True, False):
        Runtime(accelerator="cpu", deterministic=deterministic)._set_algorithms()
        assert states() == (False, False, False, None)


def test_a_search_is_fast_on_a_gpu_and_exact_on_a_cpu_unless_the_user_chooses(
    composed: Any, tmp_path: Path, nvml: FakeNVML
) -> None:
    def planned(*overrides: str) -> tuple[str, str]:
        cfg = composed(f"paths.outputs={tmp_path}", *overrides)
        plan = Plan.of(cfg, CommandLine.of(cfg.hydra))
        weights = tmp_path / "weights"
        weights.write_bytes(b"")
        return plan.options.evaluation.search, plan.evaluation_identity(weights)["search"]

    assert planned("runtime=gpu") == ("fast", "fast")
    assert planned("runtime=auto") == ("fast", "fast")
    assert planned("runtime=cpu") == ("exact", "exact")
    assert planned("runtime=gpu", "evaluation.search=exact") == ("exact", "exact")
    assert planned("runtime=cpu", "evaluation.search=fast") == ("fast", "fast")
    some = EvaluationSettings(
        n=None, diagnostic_n=None, batch_size=1, save_images=False, checks_n=0, budget=None, processes=1,
        search="auto",
        draws=20,
    )  # fmt: skip
    assert (some.resolved("cpu").search, some.resolved("cuda").search) == ("exact", "fast")
