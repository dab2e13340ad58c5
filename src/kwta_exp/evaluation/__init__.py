"""Attacking a network and keeping the books: per image, per attack, and the worst case."""

from kwta_exp.evaluation.evaluator import evaluate
from kwta_exp.evaluation.results import summarise
from kwta_exp.evaluation.verdict import plain_gradient_attacks

__all__ = ["evaluate", "plain_gradient_attacks", "summarise"]
