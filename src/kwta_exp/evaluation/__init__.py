"""Attacking a network and keeping the books: each image, each attack, the worst case, and what to believe."""

from kwta_exp.evaluation.diagnostics import Diagnosis, diagnose
from kwta_exp.evaluation.evaluator import evaluate
from kwta_exp.evaluation.results import summarise
from kwta_exp.evaluation.roles import Roles

__all__ = ["Diagnosis", "Roles", "diagnose", "evaluate", "summarise"]
