"""Training: what is minimised (:mod:`.objectives`) and how it is run (:mod:`.fit`)."""

from kwta_exp.training.fit import Fitted, fit
from kwta_exp.training.objectives import NaturalTraining, PGDTraining, Training

__all__ = ["Fitted", "NaturalTraining", "PGDTraining", "Training", "fit"]
