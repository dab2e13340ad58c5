"""Run one experiment from the command line: ``run.py`` and ``kwta-exp run``."""

import sys
import warnings
from typing import TYPE_CHECKING

import hydra

from kwta_exp.conventions import refuse
from kwta_exp.environment import CONF
from kwta_exp.runtime import let_idle_threads_sleep
from kwta_exp.shell import at_the_shell, in_a_job

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Compose the configuration of the command line, and run it."""
    let_idle_threads_sleep()
    # The plugin has an option of the same name, and Hydra checks ours against it.
    warnings.filterwarnings(
        "ignore", message=r"\s*'hydra/launcher/ray' is validated against ConfigStore schema"
    )
    with at_the_shell(_explained):
        refuse(sys.argv[1:])
        job()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: "DictConfig") -> float:
    """Run one experiment; returns the worst-case robust accuracy, for sweepers to optimise."""
    with in_a_job():
        from kwta_exp.experiment import run  # not for --help

        return run(cfg)


def _explained(error: Exception) -> str | None:
    from kwta_exp.suggest import better_message  # only for an error

    return better_message(error, sys.argv[1:])
