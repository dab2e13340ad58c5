"""k-Winners-Take-All: keep the k largest values, zero the rest.

Xiao, Zhong and Zheng, "Enhancing Adversarial Defense by k-Winners-Take-All", ICLR 2020
(arXiv 1905.10510), equation 1:  phi_k(y)_j = y_j if y_j is among the k largest of y, else 0.
"""

import math
from typing import Any, Literal

import torch
from pydantic import PositiveInt, validate_call
from torch import Tensor, nn

from kwta_exp.activations.selection import keep, kth_largest
from kwta_exp.fields import STRICT, Ratio

Over = Literal["volume", "channel"]
By = Literal["value", "magnitude"]


def kwta(
    x: Tensor,
    ratio: float | None = None,
    *,
    k: int | None = None,
    over: Over = "volume",
    by: By = "value",
) -> Tensor:
    """Zero all but the ``k`` largest values of each sample (or of each channel of it).

    Args:
        x: floating point ``(N, ...)`` of 2 to 5 dimensions, in any memory format.
        ratio: sparsity ratio gamma in (0, 1]; ``k = max(1, floor(ratio * size))`` of the ``size`` values
            that compete. The published code floors too, but fails where k is 0.
        k: the number of winners, instead of a ratio; a k larger than the number of values keeps them all.
        over: which values compete. ``"volume"``: all C*H*W values of a sample. ``"channel"``: the H*W values
            of each channel. On ``(N, C)`` both mean all C values.
        by: rank by ``"value"`` (the paper) or by ``"magnitude"``, the absolute value.

    Returns:
        A tensor like ``x``: same shape, dtype and memory format.

    Ties with the k-th largest value are all kept, as in the published code, so a constant input
    passes unchanged. Negative winners keep their sign. NaN ranks as the largest value and is passed on;
    if k or more values are NaN, no finite value wins. The gradient passes through the winners alone; the
    selection has no gradient. One bit per value is saved for the backward pass.

    Raises:
        ValueError: unless exactly one of ``ratio`` and ``k`` is given and in its range, or if ``x``
            has fewer than two dimensions.
        TypeError: unless ``x`` is in float16, bfloat16, float32 or float64.
    """
    if (ratio is None) == (k is None):
        raise ValueError(f"kwta takes either ratio or k, got ratio={ratio} and k={k}")
    if not (0 < ratio <= 1 if ratio is not None else k is not None and k >= 1):
        raise ValueError(f"kwta expects 0 < ratio <= 1 or k >= 1, got ratio={ratio} and k={k}")
    if x.dim() < 2:
        raise ValueError(f"kwta expects (N, ...) with 2 or more dimensions, got {tuple(x.shape)}")
    if x.numel() == 0:
        return x
    per_channel = over == "channel" and x.dim() > 2
    return keep(x, _winners(x, ratio, k, per_channel), per_channel, by == "magnitude")


@torch.no_grad()
def kwta_threshold(
    x: Tensor,
    ratio: float | None = None,
    *,
    k: int | None = None,
    over: Over = "volume",
    by: By = "value",
) -> Tensor:
    """The k-th largest value of each row of competitors, shaped to broadcast against ``x``.

    Arguments as for :func:`kwta`. ``inf`` where k or more values are NaN: no finite value wins there.
    """
    per_channel = over == "channel" and x.dim() > 2
    if x.numel() == 0:
        lead = 2 if per_channel else 1
        return x.new_full((*x.shape[:lead], *[1] * (x.dim() - lead)), math.inf)
    rows = _rows(x.abs() if by == "magnitude" else x, per_channel)
    threshold = kth_largest(rows, _winners(x, ratio, k, per_channel))
    threshold = threshold.masked_fill(threshold.isnan(), math.inf)
    lead = 2 if per_channel else 1
    return threshold.view(*x.shape[:lead], *[1] * (x.dim() - lead))


def _winners(x: Tensor, ratio: float | None, k: int | None, per_channel: bool) -> int:
    """The number of winners in each row."""
    size = x.shape[2:].numel() if per_channel else x.shape[1:].numel()
    return max(1, math.floor(ratio * size)) if ratio is not None else min(k or size, size)


def _rows(x: Tensor, per_channel: bool) -> Tensor:
    """View ``x`` as one row of competitors for each sample or channel, copying only if it must."""
    if per_channel:
        return x.reshape(x.shape[0] * x.shape[1], -1)
    if not x.is_contiguous():
        # Selection does not depend on the order within a row, so channels-last needs no copy.
        x = x.movedim(1, -1)
    return x.reshape(x.shape[0], -1)


class KWTA(nn.Module):
    """k-Winners-Take-All as a layer; see :func:`kwta` for the arguments and the treatment of ties.

    The ratio is part of the layer's state: ``state_dict()`` holds it, and ``load_state_dict`` restores it. A
    checkpoint without it (of a ReLU network, or of other code) loads too, and the layer keeps its own ratio.

    Args:
        ratio: sparsity ratio in (0, 1].
        k: a fixed number of winners, instead of a ratio.
        over: ``"volume"`` or ``"channel"``.
        by: ``"value"`` or ``"magnitude"``.
        relu: apply a ReLU first, so that negative values never win. Off in the paper.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        ratio: Ratio | None = None,
        k: PositiveInt | None = None,
        over: Over = "volume",
        by: By = "value",
        relu: bool = False,
    ) -> None:
        super().__init__()
        if (ratio is None) == (k is None):
            raise ValueError(f"KWTA takes either ratio or k, got ratio={ratio} and k={k}")
        self.ratio = ratio
        self.k = k
        self.over: Over = over
        self.by: By = by
        self.relu = relu

    @property
    def density(self) -> float | None:
        """The share of values that win; ``None`` where ``k`` is fixed."""
        return self.ratio

    def forward(self, x: Tensor) -> Tensor:
        if self.relu:
            x = x.relu()
        return kwta(x, self.ratio, k=self.k, over=self.over, by=self.by)

    def get_extra_state(self) -> Tensor:
        """The ratio as a float64 scalar; an empty tensor where ``k`` is fixed."""
        return torch.tensor([] if self.ratio is None else self.ratio, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` returned; a layer with a fixed ``k`` keeps it.

        Raises:
            ValueError: unless ``state`` is empty or a ratio.
        """
        if state.shape == (0,):
            return
        is_scalar = state.shape == () and state.dtype == torch.float64 and not state.is_meta
        if not is_scalar or not 0 < state.item() <= 1:
            found = state.item() if is_scalar else f"{state.dtype} of shape {tuple(state.shape)}"
            raise ValueError(f"a k-WTA layer's ratio is {found}; expected a float64 scalar in (0, 1]")
        if self.k is None:
            self.ratio = state.item()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """As torch does, but with the layer's own ratio if the checkpoint has none."""
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        amount = f"ratio={self.ratio}" if self.k is None else f"k={self.k}"
        return f"{amount}, over={self.over}, by={self.by}" + (", relu=True" if self.relu else "")
