"""Checks for masked gradients and weak attacks: each with its threshold, meaning and source beside its
measurement.

A check is one function, decorated with :func:`~kwta_exp.evaluation.checks.base.comparison` or
:func:`~kwta_exp.evaluation.checks.base.measurement`, in a module that is imported here. The checks are those of
Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018, section 3.1,
Carlini et al., "On Evaluating Adversarial Robustness", arXiv 1902.06705, sections 3 to 5, and Zimmermann et
al., "Increasing Confidence in Adversarial Robustness Evaluations", NeurIPS 2022. They look at what a network
does, never at what it is made of.
"""

from kwta_exp.evaluation.checks import attacks, gradients, operators, outputs, repetition, binarization_test  # isort: skip
from kwta_exp.evaluation.checks.base import CHECKS, Check, Diagnosis, compare, diagnose, table

__all__ = [
    "CHECKS",
    "Check",
    "Diagnosis",
    "attacks",
    "binarization_test",
    "compare",
    "diagnose",
    "gradients",
    "operators",
    "outputs",
    "repetition",
    "table",
]
