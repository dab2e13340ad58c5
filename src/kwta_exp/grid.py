"""What Hydra calls when a grid begins: it gets a folder of its own, which records its jobs."""

from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from kwta_exp import environment
from kwta_exp.config import validated
from kwta_exp.errors import UserError
from kwta_exp.settings import SweepSettings
from kwta_exp.shell import end_with
from kwta_exp.sweeps import Sweep


class RecordGrid(Callback):
    """Makes ``hydra.sweep.dir`` the folder of the grid, in this process and in its jobs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Name the folder, and record the jobs as far as they are known; a mistake ends the command."""
        try:
            self._begin(config)
        except UserError as error:  # Hydra would only warn of it
            end_with(error)

    def _begin(self, config: DictConfig) -> None:
        given: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        overrides = list(map(str, given))
        validated(SweepSettings, {"sweep": config.sweep})  # a bad name must not become a folder
        sweep = Sweep.named(Path(config.paths.outputs), overrides, config.sweep)
        if not any(text.startswith("hydra.sweep.dir=") for text in config.hydra.overrides.hydra):
            with open_dict(config):
                config.hydra.sweep.dir = str(sweep.path)
                # Jobs are composed anew, from these overrides and their own.
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir={sweep.path}")
        Sweep(Path(config.hydra.sweep.dir)).begin(environment.command(), overrides, _jobs(config, overrides))


def _jobs(config: DictConfig, overrides: list[str]) -> list[list[str]] | None:
    """The overrides of each job, in order; ``None`` for a sweeper that decides as it goes."""
    if config.hydra.sweeper._target_.rpartition(".")[2] != BasicSweeper.__name__:
        return None
    batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
    return [list(job) for batch in batches for job in batch]
