"""What the tests share: a small world that trains in a second, and the command line."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from kwta_exp import hardware
from tests.cpus import CPUS, SIMULATED_CPU, simulate
from tests.forked import freeze_loaded_objects, run_forked
from tests.launched import parse_once

ROOT = Path(__file__).parent.parent

TINY = [
    "model=mlp", "model.hidden=[32]", "training.epochs=2", "evaluation.n=40", "evaluation.batch_size=16",
    "attack.pgd.steps=5", "attack.pgd.restarts=1", "attack.bpda.steps=3", "attack.bpda.restarts=2",
    "runtime=cpu", "runtime.threads=1",
]  # fmt: skip
"""Overrides that make a digits run take a second."""


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    """So that neither the machine nor the order of the tests, which workers share out, decides anything."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(params=CPUS)
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test once for each kind of CPU."""
    simulate(request.param, monkeypatch.setattr)
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def _cpu_of_the_suite() -> Iterator[None]:
    """``KWTA_EXP_TEST_CPU`` makes the whole suite, but for new processes, run as on that kind of CPU."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if asked := os.environ.get(SIMULATED_CPU):
            simulate(asked, monkeypatch.setattr)
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: a worker for each usable core, and no more than four: one takes up to 3 GB."""
    return min(hardware.usable_cores(), 4)


def pytest_collection_finish() -> None:
    """All tests are imported."""
    parse_once()
    freeze_loaded_objects()


@pytest.fixture
def composed() -> Iterator[Callable[..., DictConfig]]:
    """Compose ``conf/`` with overrides, as run.py would."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield lambda *overrides: compose("config", list(overrides), return_hydra_config=True)


def run_py(*overrides: str, cwd: Path = ROOT, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run run.py in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *overrides],
        capture_output=True, text=True, cwd=cwd, timeout=timeout, env=_environment(), check=False,
    )  # fmt: skip


def run_py_forked(
    *overrides: str, cwd: Path = ROOT, timeout: float = 300
) -> "subprocess.CompletedProcess[str]":
    """As :func:`run_py`, in a fork of a process that has torch loaded: half a second instead of four.

    For all but what concerns the start and the end of a process: which modules are loaded, signals, a closed
    pipe, the encoding of a terminal.
    """
    return run_forked(list(overrides), cwd, _environment(), timeout)


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "KWTA_EXP_DATA")}


@pytest.fixture
def linear_model() -> torch.nn.Module:
    return random_linear_model()


def random_linear_model() -> torch.nn.Module:
    """A random linear classifier of 3x4x4 images into 5 classes, in float64."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        # Centred, so that images near grey are decided by small margins.
        model[1].bias.sub_(model[1].weight.sum(1) * 0.5 + model[1].bias)
    return model.eval()


@pytest.fixture
def arrays_file(tmp_path: Path) -> Path:
    """An .npz of random colour images, sorted by class."""
    rng = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    np.savez(
        path,
        x_train=rng.integers(0, 256, (60, 9, 7, 3), dtype=np.uint8),
        y_train=np.repeat(np.arange(3), 20),
        x_test=rng.integers(0, 256, (30, 9, 7, 3), dtype=np.uint8),
        y_test=np.repeat(np.arange(3), 10),
    )
    return path
