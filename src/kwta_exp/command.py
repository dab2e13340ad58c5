"""One experiment from the command line: what ``run.py`` and ``kwta-exp run`` do."""

from typing import TYPE_CHECKING

import hydra

from kwta_exp.environment import CONF

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: "DictConfig") -> float:
    """Run one experiment; returns the accuracy left in the worst case, for sweepers to optimise."""
    from kwta_exp.experiment import run  # not for --help

    return run(cfg)
