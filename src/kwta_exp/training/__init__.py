"""Training: losses (:mod:`.objectives`), sparsity schedules (:mod:`.sparsity`), the loop (:mod:`.trainer`)."""

from kwta_exp.training.objectives import (
    AdversarialTraining,
    ALPTraining,
    FastTraining,
    FreeTraining,
    MARTTraining,
    NaturalTraining,
    PGDTraining,
    TRADESTraining,
    Training,
)

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
