"""Sparse activations, as modules and functions, to use in place of a ReLU."""

from kwta_exp.activations.kwta import KWTA, kwta
from kwta_exp.activations.lwta import LWTA, lwta
from kwta_exp.activations.mean_sparse import MeanSparse, mean_sparse
from kwta_exp.activations.stochastic_lwta import StochasticLWTA, stochastic_lwta

__all__ = ["KWTA", "LWTA", "MeanSparse", "StochasticLWTA", "kwta", "lwta", "mean_sparse", "stochastic_lwta"]
