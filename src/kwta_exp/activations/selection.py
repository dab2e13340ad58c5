"""The k-th largest value of each row: all that k-winners-take-all costs."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Rows = npt.NDArray[Any]

# Defined the short way: torch.library.custom_op loads the compiler (2 s) at the first call.
torch.library.define("kwta_exp::kth_largest", "(Tensor rows, int k) -> Tensor")


def kth_largest(rows: Tensor, k: int) -> Tensor:
    """The k-th largest value of each row, exactly and without sorting.

    Args:
        rows: floating point ``(N, M)``; takes part in no gradient.
        k: rank from the top, ``1 <= k <= M``.

    Returns:
        ``(N, 1)`` in the dtype of ``rows``. NaN ranks above every number, as in ``torch.topk``.

    On a CPU NumPy's SIMD quickselect does the work, over torch's threads where rows are long; elsewhere
    ``torch.topk``. An opaque operator, so that ``torch.compile`` sees no graph break.
    """
    selected: Tensor = torch.ops.kwta_exp.kth_largest(rows, k)
    return selected


@torch.library.impl("kwta_exp::kth_largest", "CPU")
def _on_cpu(rows: Tensor, k: int) -> Tensor:
    position = rows.shape[1] - k
    values, restore = _comparable(rows)
    if rows.shape[1] < LONG_ROW:
        selected = np.partition(values, position, axis=1)[:, position]
    else:
        selected = np.empty(len(values), values.dtype)
        parts = np.array_split(np.arange(len(values)), min(torch.get_num_threads(), len(values)))
        if len(parts) == 1:
            _select_rows(values, position, parts[0], selected)
        else:
            with ThreadPoolExecutor(len(parts)) as pool:  # NumPy lets go of the interpreter as it partitions
                list(pool.map(partial(_select_rows, values, position, out=selected), parts))
    return restore(torch.from_numpy(selected.copy()))[:, None]


LONG_ROW = 4096
"""From here on rows are partitioned one by one, in a scratch of one row that stays in the cache."""


def _select_rows(values: _Rows, position: int, which: _Rows, out: _Rows) -> None:
    scratch = np.empty(values.shape[1], values.dtype)
    for row in which:
        scratch[:] = values[row]
        scratch.partition(position)
        out[row] = scratch[position]


def _comparable(rows: Tensor) -> tuple[_Rows, Callable[[Tensor], Tensor]]:
    """The values as NumPy can partition them, and the way back.

    Half precision is compared by its bits, as int16: those of a positive number are in its order, those
    of a negative one reversed. That is exact, and faster than widening. (-0 comes out below +0, which
    changes no winner, since it equals it; NaN above everything, as elsewhere.)
    """
    if rows.dtype not in (torch.bfloat16, torch.float16):
        return rows.numpy(), lambda selected: selected
    bits = rows.view(torch.int16)
    infinity = 0x7F80 if rows.dtype == torch.bfloat16 else 0x7C00
    magnitude = bits & 0x7FFF
    ordered = bits ^ ((bits >> 15) & 0x7FFF)
    ordered = torch.where(magnitude > infinity, 0x7FFF, ordered)

    def restore(selected: Tensor) -> Tensor:
        return (selected ^ ((selected >> 15) & 0x7FFF)).view(rows.dtype)

    return ordered.numpy(), restore


@torch.library.impl("kwta_exp::kth_largest", "CUDA")
def _on_cuda(rows: Tensor, k: int) -> Tensor:
    return rows.topk(k, dim=1).values[:, -1:].clone()


@torch.library.register_fake("kwta_exp::kth_largest")  # type: ignore[untyped-decorator]
def _shape(rows: Tensor, k: int) -> Tensor:
    return rows.new_empty(rows.shape[0], 1)
