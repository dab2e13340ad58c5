"""Operators that pass no gradient, differentiated through a smooth function near them.

BPDA (Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018, section
4.1) needs a smooth stand-in for what blocks the gradient. Here the stand-ins are those of torch's operators, so
a network needs no change: under :class:`Relaxing`, a comparison, a rounding, a selection of the largest values
or a saturated squashing goes forward exactly, to the bit, and backward through its stand-in.

A comparison returns booleans, which carry no gradient. So a tensor of booleans or integers is given a *soft
value*: a float tensor near it, with a graph. Operators that turn it into floats again, or that select by it,
hand the gradient to its soft value.
"""

from kwta_exp.attacks.relaxing import carrying, stand_ins
from kwta_exp.attacks.relaxing.mode import Relaxing, StraightThrough, unseen

__all__ = ["Relaxing", "StraightThrough", "carrying", "stand_ins", "unseen"]
