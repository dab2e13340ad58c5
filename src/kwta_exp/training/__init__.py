"""Training: what is minimised (:mod:`.objectives`) and how it is run (:mod:`.fit`)."""

from kwta_exp.training.objectives import NaturalTraining, PGDTraining, Training

__all__ = ["NaturalTraining", "PGDTraining", "Training"]
