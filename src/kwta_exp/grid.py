"""What Hydra calls when a grid begins: it gets a folder of its own, which records its jobs."""

import importlib.util
import logging
import shlex
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from kwta_exp import environment, hardware
from kwta_exp.config import validated
from kwta_exp.errors import UserError
from kwta_exp.settings import SweepSettings
from kwta_exp.shell import end_with
from kwta_exp.sweeps import Sweep

log = logging.getLogger(__name__)


class RecordGrid(Callback):
    """Makes ``hydra.sweep.dir`` the folder of the grid, in this process and in its jobs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Name the folder, and record the jobs as far as they are known; a mistake ends the command."""
        try:
            self._begin(config)
        except UserError as error:  # Hydra would only warn of it
            end_with(error)

    def _begin(self, config: DictConfig) -> None:
        _require_plugin(str(config.hydra.launcher._target_))
        given: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        overrides = list(map(str, given))
        chosen = {"sweep": config.sweep, "jobs_per_gpu": config.jobs_per_gpu}
        validated(SweepSettings, chosen)  # a bad name must not become a folder
        sweep = Sweep.named(Path(config.paths.outputs), overrides, config.sweep)
        with open_dict(config):
            config.hydra.sweep.dir = str(sweep.path)
            # Jobs are composed anew, from these overrides and their own.
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={sweep.path}")
        _divide_machine(config)
        overrides = list(map(str, config.hydra.overrides.task))
        sweep.begin(environment.command(), overrides, _jobs(config, overrides))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Say where the answer is."""
        log.info("kwta-exp summary %s", shlex.quote(str(config.hydra.sweep.dir)))


_PLUGINS = {
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher": ("parallel", "joblib"),
    "hydra_plugins.kwta_exp_launchers.SlurmLauncher": ("slurm", "submitit"),
    "hydra_plugins.kwta_exp_launchers.RayLauncher": ("ray", "ray"),
}
"""The option and the plugin of each launcher in ``conf/hydra/launcher``."""


def _require_plugin(target: str) -> None:
    extra, plugin = _PLUGINS.get(target, ("", ""))
    if extra and importlib.util.find_spec(f"hydra_plugins.hydra_{plugin}_launcher") is None:
        raise UserError(
            f"hydra/launcher={extra}: hydra-{plugin}-launcher is not installed; expected it:"
            f" pip install 'kwta_exp[{extra}]', or in a checkout .venv/bin/pip install -e '.[{extra}]'"
        )


def _divide_machine(config: DictConfig) -> None:
    """Say how many jobs run at once and how many threads each may use, where the user leaves that open."""
    launcher = config.hydra.launcher
    name = str(launcher._target_).rpartition(".")[2]
    threads: int | None = None
    with open_dict(config):
        if name == "JoblibLauncher":
            if launcher.get("n_jobs") is None:
                launcher.n_jobs = hardware.jobs_at_once(config.jobs_per_gpu)
                config.hydra.overrides.hydra.append(f"hydra.launcher.n_jobs={launcher.n_jobs}")
            at_once = launcher.n_jobs if launcher.n_jobs > 0 else hardware.usable_cores()
            threads = max(1, hardware.usable_cores() // at_once)
        elif name == "RayLauncher":
            threads = max(1, int(launcher.ray.remote.get("num_cpus") or 1))
        elif name == "SlurmLauncher":
            threads = launcher.get("cpus_per_task")
        given = any(text.lstrip("+").startswith("runtime.threads=") for text in config.hydra.overrides.task)
        if threads is not None and not given and config.runtime.threads is None:
            config.hydra.overrides.task.append(f"runtime.threads={threads}")


def _jobs(config: DictConfig, overrides: list[str]) -> list[list[str]] | None:
    """The overrides of each job, in order; ``None`` for a sweeper that decides as it goes."""
    if config.hydra.sweeper._target_.rpartition(".")[2] != BasicSweeper.__name__:
        return None
    batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
    return [list(job) for batch in batches for job in batch]
