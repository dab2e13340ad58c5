"""Training: what is minimised (:mod:`.objectives`), on what sparsity (:mod:`.sparsity`), and how it is
run (:mod:`.fit`).
"""

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
