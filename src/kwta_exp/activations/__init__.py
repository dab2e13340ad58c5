"""Sparse activations, as modules and functions, to use in place of a ReLU."""

from kwta_exp.activations.kwta import KWTA, kwta
from kwta_exp.activations.lwta import LWTA, lwta
from kwta_exp.activations.stochastic_lwta import StochasticLWTA, stochastic_lwta

__all__ = ["KWTA", "LWTA", "StochasticLWTA", "kwta", "lwta", "stochastic_lwta"]
