"""The k-th largest value of each row: all that k-winners-take-all costs."""

import numpy as np
import torch
from torch import Tensor


@torch.library.custom_op("kwta_exp::kth_largest", mutates_args=())
def kth_largest(rows: Tensor, k: int) -> Tensor:
    """The k-th largest value of each row, exactly and without sorting.

    Args:
        rows: floating point ``(N, M)``.
        k: rank from the top, ``1 <= k <= M``.

    Returns:
        ``(N, 1)`` in the dtype of ``rows``. NaN ranks above every number, as in ``torch.topk``.

    On a CPU NumPy's SIMD quickselect does the work (half precision is widened first, which keeps the
    order); elsewhere ``torch.topk``. An opaque operator, so that ``torch.compile`` sees no graph break.
    """
    if rows.device.type != "cpu":
        return rows.topk(k, dim=1).values[:, -1:].clone()
    wide = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    position = rows.shape[1] - k
    partitioned = np.partition(wide.detach().numpy(), position, axis=1)
    return torch.from_numpy(partitioned[:, position : position + 1].copy()).to(rows.dtype)


@kth_largest.register_fake
def _(rows: Tensor, k: int) -> Tensor:
    return rows.new_empty(rows.shape[0], 1)
