"""One experiment from the command line: what ``run.py`` and ``kwta-exp run`` do."""

import sys
from typing import TYPE_CHECKING

import hydra

from kwta_exp.environment import CONF
from kwta_exp.runtime import let_idle_threads_sleep
from kwta_exp.shell import at_the_shell, in_a_job

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Compose the configuration that the command line asks for, and run it."""
    let_idle_threads_sleep()
    with at_the_shell(_explained):
        job()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(cfg: "DictConfig") -> float:
    """Run one experiment; returns the accuracy left in the worst case, for sweepers to optimise."""
    with in_a_job():
        from kwta_exp.experiment import run  # not for --help

        return run(cfg)


def _explained(error: Exception) -> str | None:
    from kwta_exp.suggest import better_message  # only now: most commands have no need of it

    return better_message(error, sys.argv[1:], CONF)
