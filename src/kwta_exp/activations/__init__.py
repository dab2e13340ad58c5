"""Sparse activations: modules and functions that stand where a ReLU would."""

from kwta_exp.activations.kwta import KWTA, kwta
from kwta_exp.activations.lwta import LWTA, lwta

__all__ = ["KWTA", "LWTA", "kwta", "lwta"]
