"""Train, attack and report: ``python run.py`` for the demo, ``python run.py --help`` for the rest."""

from typing import TYPE_CHECKING

import hydra

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: "DictConfig") -> float:
    """Run one experiment; returns the accuracy left in the worst case, for sweepers to optimise."""
    from kwta_exp.experiment import run  # not for --help

    return run(cfg)


if __name__ == "__main__":
    main()
