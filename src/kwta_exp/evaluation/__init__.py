"""Attacking a network and keeping the books: per image, per attack, and the worst case."""

from kwta_exp.evaluation.evaluator import evaluate
from kwta_exp.evaluation.results import summarise

__all__ = ["evaluate", "summarise"]
