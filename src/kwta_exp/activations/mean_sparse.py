"""Mean-centred sparsification before a ReLU: values near their channel's mean become that mean.

Amini, Teymoorianfard, Ma and Houmansadr, "MeanSparse: Post-Training Robustness Enhancement Through
Mean-Centered Feature Sparsification", arXiv 2406.05927.
"""

from typing import Any

import torch
from pydantic import NonNegativeFloat, validate_call
from torch import Tensor, nn

from kwta_exp.fields import STRICT

_MOMENTUM = 0.1
"""Of the running statistics: the weight of the newest batch, as in torch's BatchNorm."""


def mean_sparse(x: Tensor, mean: Tensor, variance: Tensor, alpha: float = 0.2) -> Tensor:
    """Set the values within ``alpha`` standard deviations of their channel's mean to that mean.

    Args:
        x: floating point ``(N, C, ...)``.
        mean: of each channel, ``(C,)``.
        variance: of each channel, ``(C,)``, not negative.
        alpha: half the width of the band, in standard deviations, 0 or more. Its edges belong to it.

    Returns:
        A tensor like ``x``. The gradient passes through the values outside the band alone. A NaN stays NaN.

    Raises:
        ValueError: if ``x`` has fewer than 2 dimensions, or other channels than the statistics.
    """
    if x.dim() < 2:
        raise ValueError(f"mean_sparse expects (N, C, ...), got {tuple(x.shape)}")
    if mean.shape != (x.shape[1],) or variance.shape != mean.shape:
        raise ValueError(
            f"mean_sparse has statistics of {len(mean)} channels; expected the layer's {x.shape[1]}"
        )
    shape = (1, -1, *[1] * (x.dim() - 2))
    centre = mean.view(shape).to(x.dtype)
    width = (alpha * variance.sqrt()).view(shape).to(x.dtype)
    return torch.where((x - centre).abs() <= width, centre, x)


class MeanSparse(nn.Module):
    """A ReLU; in evaluation mode with :func:`mean_sparse` before it.

    In training mode it is a ReLU and collects the running mean and variance of its input, of each channel over
    samples and positions, like BatchNorm: they begin at 0 and 1, and the newest batch has the weight 0.1.
    Unlike BatchNorm's, the variance is the population's, so that one value is enough. The paper collects them
    in a pass over the training set after training, and chooses alpha by the accuracy that is left.

    The number of channels is that of the first input. The statistics are buffers, which move with the network,
    and part of its state: ``state_dict()`` holds them as extra state, since a new layer has no channels yet. A
    checkpoint without them loads too, and the layer keeps its own.

    Args:
        alpha: half the width of the band, in standard deviations; at 0 this is a ReLU.
    """

    running_mean: Tensor
    running_var: Tensor

    @validate_call(config=STRICT)
    def __init__(self, alpha: NonNegativeFloat = 0.2) -> None:
        super().__init__()
        self.alpha = alpha
        self.register_buffer("running_mean", torch.empty(0), persistent=False)
        self.register_buffer("running_var", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not len(self.running_mean) and x.dim() > 1:
            dtype = torch.promote_types(x.dtype, torch.float32)
            self._set(x.new_zeros(x.shape[1], dtype=dtype), x.new_ones(x.shape[1], dtype=dtype))
        if self.training:
            self._collect(x.detach())
            return x.relu()
        return mean_sparse(x, self.running_mean, self.running_var, self.alpha).relu()

    @torch.no_grad()
    def _collect(self, x: Tensor) -> None:
        """Move the running statistics a tenth of the way to those of this batch."""
        if x.numel():
            others = [dimension for dimension in range(x.dim()) if dimension != 1]
            variance, mean = torch.var_mean(x.to(self.running_mean.dtype), others, correction=0)
            self.running_mean.lerp_(mean, _MOMENTUM)
            self.running_var.lerp_(variance, _MOMENTUM)

    def _set(self, mean: Tensor, variance: Tensor) -> None:
        self.running_mean, self.running_var = mean, variance

    def get_extra_state(self) -> Tensor:
        """Mean and variance, ``(2, C)``; an empty tensor before the first input."""
        if not len(self.running_mean):
            return torch.empty(0)
        return torch.stack([self.running_mean, self.running_var])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` returned.

        Raises:
            ValueError: unless ``state`` is empty or holds finite means and variances, of as many channels as
                the layer has, if it has had an input.
        """
        if state.shape == (0,):
            return
        channels = len(self.running_mean)
        if state.dim() != 2 or len(state) != 2 or (channels and state.shape[1] != channels):
            raise ValueError(
                f"a MeanSparse layer's statistics have shape {tuple(state.shape)}; expected (2,"
                f" {channels or 'channels'})"
            )
        given = state.detach().to(self.running_mean)
        if given.is_meta or not given.isfinite().all() or (given[1] < 0).any():
            raise ValueError(
                "a MeanSparse layer's statistics are not finite means and variances of 0 or more; expected"
                " what get_extra_state() returns"
            )
        self._set(given[0].clone(), given[1].clone())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """As torch does, but with the layer's own statistics if the checkpoint has none."""
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
