"""Train, attack and report: ``python run.py`` for the demo, ``python run.py --help`` for the rest."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra

from kwta_exp.shell import at_the_shell, in_a_job

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: "DictConfig") -> float:
    """Run one experiment; returns the accuracy left in the worst case, for sweepers to optimise."""
    with in_a_job():
        from kwta_exp.experiment import run  # not for --help

        return run(cfg)


def _explained(error: Exception) -> str | None:
    from kwta_exp.suggest import better_message  # only now: most commands have no need of it

    return better_message(error, sys.argv[1:], Path(__file__).parent / "conf")


if __name__ == "__main__":
    with at_the_shell(_explained):
        main()
