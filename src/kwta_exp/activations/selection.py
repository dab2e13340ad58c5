"""The k-th largest value of each row: all that k-winners-take-all costs."""

import numpy as np
import torch
from torch import Tensor

# Defined the short way: torch.library.custom_op loads the compiler (2 s) at the first call.
torch.library.define("kwta_exp::kth_largest", "(Tensor rows, int k) -> Tensor")


def kth_largest(rows: Tensor, k: int) -> Tensor:
    """The k-th largest value of each row, exactly and without sorting.

    Args:
        rows: floating point ``(N, M)``; takes part in no gradient.
        k: rank from the top, ``1 <= k <= M``.

    Returns:
        ``(N, 1)`` in the dtype of ``rows``. NaN ranks above every number, as in ``torch.topk``.

    On a CPU NumPy's SIMD quickselect does the work (half precision is widened first, which keeps the
    order); elsewhere ``torch.topk``. An opaque operator, so that ``torch.compile`` sees no graph break.
    """
    selected: Tensor = torch.ops.kwta_exp.kth_largest(rows, k)
    return selected


@torch.library.impl("kwta_exp::kth_largest", "CPU")
def _on_cpu(rows: Tensor, k: int) -> Tensor:
    wide = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    position = rows.shape[1] - k
    partitioned = np.partition(wide.numpy(), position, axis=1)
    return torch.from_numpy(partitioned[:, position : position + 1].copy()).to(rows.dtype)


@torch.library.impl("kwta_exp::kth_largest", "CUDA")
def _on_cuda(rows: Tensor, k: int) -> Tensor:
    return rows.topk(k, dim=1).values[:, -1:].clone()


@torch.library.register_fake("kwta_exp::kth_largest")  # type: ignore[untyped-decorator]
def _shape(rows: Tensor, k: int) -> Tensor:
    return rows.new_empty(rows.shape[0], 1)
