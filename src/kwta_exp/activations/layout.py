"""A dense tensor as rows of competitors, without a copy where its memory format allows that."""

import torch
from torch import Tensor


def in_channels_last(x: Tensor) -> bool:
    """Whether ``x`` is channels-last contiguous, and not contiguous in the default order as well."""
    return not x.is_contiguous() and x.dim() in _LAST and x.is_contiguous(memory_format=_LAST[x.dim()])


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _laid_out(x: Tensor, channels_last: bool) -> Tensor:
    form = _LAST[x.dim()] if channels_last else torch.contiguous_format
    return x if x.is_contiguous(memory_format=form) else x.contiguous(memory_format=form)


def _rows(x: Tensor, bits: Tensor | None = None, per_channel: bool = False) -> Tensor:
    """View a dense ``x`` as rows in memory order; the order within a row does not matter."""
    count = len(bits) if bits is not None else x.shape[0] * (x.shape[1] if per_channel else 1)
    values = x.numel()
    if not values:
        raise ValueError(f"no value to select from: {tuple(x.shape)}")
    return x.as_strided((count, values // count), (values // count, 1))


def _on_its_own_layout(x: Tensor, per_channel: bool) -> tuple[Tensor, bool]:
    """``x`` made dense, copied only if necessary, and whether its rows are in channels-last order."""
    channels_last = in_channels_last(x) and not per_channel
    return _laid_out(x, channels_last), channels_last
