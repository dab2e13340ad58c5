"""Local Winner-Take-All: small groups of units, one winner each.

Srivastava, Masci, Kazerounian, Gomez and Schmidhuber, "Compete to Compute", NIPS 2013, section 3.
"""

import math

import torch
from pydantic import PositiveInt, validate_call
from torch import Tensor, nn

from kwta_exp.fields import STRICT


def lwta(x: Tensor, group_size: int = 2) -> Tensor:
    """Keep the largest value of every group of neighbouring units and zero the others.

    Args:
        x: floating point ``(N, C, ...)``. The units that compete are ``group_size`` consecutive
            channels at the same position.
        group_size: units in a group; must divide C.

    Returns:
        A tensor like ``x``. Values tied for the largest are all kept (the original keeps the lowest index).
        A NaN is kept, and nothing else in its group.

    Raises:
        ValueError: if ``group_size`` does not divide C, or ``x`` has fewer than 2 dimensions.
    """
    if x.dim() < 2:
        raise ValueError(f"lwta expects (N, C, ...), got {tuple(x.shape)}")
    channels = x.shape[1]
    if channels % group_size:
        raise ValueError(f"group_size={group_size} does not divide the layer's {channels} units")
    groups = x.detach().unflatten(1, (channels // group_size, group_size))
    best = groups.amax(dim=2, keepdim=True)
    losers = groups < best.masked_fill(best.isnan(), math.inf)
    return torch.where(losers.flatten(1, 2), 0, x)


class LWTA(nn.Module):
    """Local Winner-Take-All as a layer; see :func:`lwta`."""

    @validate_call(config=STRICT)
    def __init__(self, group_size: PositiveInt = 2) -> None:
        super().__init__()
        self.group_size = group_size

    @property
    def density(self) -> float:
        """The share of values that win."""
        return 1 / self.group_size

    def forward(self, x: Tensor) -> Tensor:
        return lwta(x, self.group_size)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}"
