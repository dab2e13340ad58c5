"""Training methods, one per file. Each defines the loss of a batch."""

from kwta_exp.training.objectives.alp import ALPTraining
from kwta_exp.training.objectives.base import AdversarialTraining, Training
from kwta_exp.training.objectives.fast import FastTraining
from kwta_exp.training.objectives.free import FreeTraining
from kwta_exp.training.objectives.mart import MARTTraining
from kwta_exp.training.objectives.natural import NaturalTraining
from kwta_exp.training.objectives.pgd import PGDTraining
from kwta_exp.training.objectives.trades import TRADESTraining

__all__ = [
    "ALPTraining",
    "AdversarialTraining",
    "FastTraining",
    "FreeTraining",
    "MARTTraining",
    "NaturalTraining",
    "PGDTraining",
    "TRADESTraining",
    "Training",
]
