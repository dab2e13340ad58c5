"""The environment of a run: versions, machine, threads, commit, command."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kwta_exp import hardware

_PACKAGES = (
    "kwta_exp", "torch", "torchvision", "lightning-fabric", "hydra-core", "omegaconf", "foolbox",
    "numpy", "scikit-learn", "safetensors", "pydantic",
)  # fmt: skip

CONF = next(
    folder
    for folder in (Path(__file__).parent / "conf", Path(__file__).parents[2] / "conf")
    if (folder / "config.yaml").is_file()
)
"""The folder of the configuration: in the installed package, or beside ``src`` in a checkout."""


def describe(command: str, device: str, runtime: dict[str, Any]) -> dict[str, Any]:
    """The content of ``environment.json``.

    Args:
        command: the command line.
        device: the device's name, such as ``"cpu"`` or a GPU's.
        runtime: accelerator, devices, precision and threads as resolved.

    A run on a GPU has ``gpu``: its name, memory in bytes and compute capability, and the versions of the
    driver, of CUDA and of cuDNN.
    """
    return {
        "command": command,
        "commit": commit(),
        "device": device,
        "runtime": runtime,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": processor(),
        "cores": hardware.usable_cores(),
        "packages": {name: _version(name) for name in _PACKAGES},
        **({"gpu": _gpu()} if runtime.get("accelerator") == "cuda" else {}),
    }


def _gpu() -> dict[str, Any]:
    return {**asdict(hardware.first_gpu() or hardware.Gpu()), **hardware.cuda_versions()}


def processor() -> str:
    """The CPU's name; another CPU may round differently."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def slurm_job() -> str | None:
    """What ``scancel`` calls this process's SLURM job: its number, or that of its array and task."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def command() -> str:
    """The command line of this process, as a shell would take it."""
    return shlex.join([*program(), *sys.argv[1:]])


def program() -> list[str]:
    """The program in this process's command line: ``python run.py`` or ``kwta-exp run``."""
    name = Path(sys.argv[0]).name
    return ["python", name] if name.endswith(".py") else name.split()


def commit() -> str | None:
    """The commit of the source tree, with ``+changes`` if files differ from it; ``None`` outside git."""
    tree = Path(__file__).parent
    try:
        head = _git(tree, "rev-parse", "HEAD")
        changed = _git(tree, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if changed else head


def _git(tree: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(tree), *arguments], check=True, capture_output=True, text=True, timeout=10
    )
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
