"""A server process that imports everything a run needs once, and forks a child for each command line.

A child behaves as ``python run.py ...``: it has its own arguments, folder, environment, stdout and stderr.
Environment variables that are read on import (``OMP_NUM_THREADS``) have no effect on it.
"""

import atexit
import gc
import importlib
import inspect
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.cpus import SIMULATED_CPU, simulate
from tests.launched import CONF, parse_once

ROOT = Path(__file__).parent.parent
LOADED = [
    "kwta_exp.attacks", "kwta_exp.draw.confusion", "kwta_exp.draw.pages", "kwta_exp.draw.passes",
    "kwta_exp.draw.training", "kwta_exp.evaluation", "kwta_exp.experiment", "kwta_exp.models", "kwta_exp.parts",
    "kwta_exp.report.terminal", "kwta_exp.training.trainer", "foolbox", "lightning_fabric",
    "matplotlib.backends.backend_svg", "matplotlib.figure", "sklearn.datasets", "torchvision",
]  # fmt: skip


def run_forked(
    arguments: list[str], cwd: Path, environment: dict[str, str], timeout: float
) -> "subprocess.CompletedProcess[str]":
    """Run run.py with ``arguments`` in a fork of the server. The first call starts the server.

    Raises:
        subprocess.TimeoutExpired: after ``timeout`` seconds.
    """
    server = _server()
    assert server.stdin
    assert server.stdout
    command = ["run.py", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = {
            "arguments": arguments, "cwd": str(cwd), "environment": environment, "timeout": timeout,
            "out": str(out), "err": str(err),
        }  # fmt: skip
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        if status == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(command, timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())


@cache
def _server() -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forked"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    atexit.register(process.communicate)  # closing its stdin ends it
    return process


def _serve() -> None:
    _load()
    if cpu := os.environ.get(SIMULATED_CPU):
        simulate(cpu, setattr)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _set_up(json.loads(line))
            os._exit(_run())  # a normal exit would write to, and so copy, all shared memory
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _load() -> None:
    """Import what a run imports, and fill the caches of Hydra's parser and of ``inspect``.

    Nothing here may use more than one thread: threads do not survive a fork.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    for name in LOADED:
        importlib.import_module(name)
    parse_once()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        repository = GlobalHydra.instance().config_loader().repository
        for path in CONF.rglob("*.yaml"):
            repository.load_config(str(path.relative_to(CONF).with_suffix("")))
        compose("config", ["+attack@attack.x=pgd", "attack.x.steps=1", "model.hidden=[8]", "model=mlp"])
    inspect.stack()
    _compile()
    freeze_loaded_objects()


def _compile() -> None:
    """Load the compiled kernels, on an input so small that one thread computes it.

    Without a backward pass where a GPU is visible: there torch's first one, even on the CPU, starts a thread
    for each device, and refuses every backward pass in a fork after that. The children load that kernel
    themselves.
    """
    import torch

    from kwta_exp import hardware
    from kwta_exp.activations import kwta

    torch.set_num_threads(1)
    differentiates = hardware.nvidia_gpus() == 0
    winners = kwta(torch.ones(2, 8, requires_grad=differentiates), 0.5)
    if differentiates:
        winners.sum().backward()


def freeze_loaded_objects() -> None:
    """Exclude all loaded objects from garbage collection, which otherwise takes a quarter of a composition."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _set_up(request: dict[str, Any]) -> None:
    """Set this process's folder, environment, arguments and output to those of the request."""
    signal.setitimer(signal.ITIMER_REAL, request["timeout"])  # its signal kills the process
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.chdir(request["cwd"])
    for number, path in enumerate((os.devnull, request["out"], request["err"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [str(ROOT / "run.py"), *request["arguments"]]


def _run() -> int:
    """Run run.py as the interpreter would, and return the exit status."""
    status: Any = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:  # no child may return to the server's loop
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


if __name__ == "__main__":
    _serve()
