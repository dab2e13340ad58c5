"""Training methods, one a file: each says what a batch's loss is."""

from kwta_exp.training.objectives.base import Training
from kwta_exp.training.objectives.natural import NaturalTraining
from kwta_exp.training.objectives.pgd import PGDTraining

__all__ = ["NaturalTraining", "PGDTraining", "Training"]
