"""What every network here is given in place of a ReLU: a way to make its activation."""

from collections.abc import Callable

from torch import nn

ActivationFactory = Callable[[], nn.Module]
"""Makes a fresh activation module, e.g. ``nn.ReLU`` or ``partial(KWTA, ratio=0.1)``."""
