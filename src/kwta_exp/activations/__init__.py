"""Sparse activations, as modules and functions, to use in place of a ReLU."""

from kwta_exp.activations.kwta import KWTA, kwta
from kwta_exp.activations.lwta import LWTA, lwta

__all__ = ["KWTA", "LWTA", "kwta", "lwta"]
