"""Attacking a network, image by image: records, the worst case, and whether to believe it."""

from kwta_exp.evaluation.checks import Diagnosis, diagnose
from kwta_exp.evaluation.evaluation import Evaluation
from kwta_exp.evaluation.outcome import Outcome
from kwta_exp.evaluation.ranks import Ranks
from kwta_exp.evaluation.results import evaluate, summarise
from kwta_exp.evaluation.roles import Roles

__all__ = ["Diagnosis", "Evaluation", "Outcome", "Ranks", "Roles", "diagnose", "evaluate", "summarise"]
