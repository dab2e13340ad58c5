"""GPU kernels that select the k largest values of each row: exact, without sorting.

A value becomes an unsigned integer of the same order, its key, which can be converted back (except for the
sign of a zero). Rows of up to ``IN_REGISTERS`` values are read once and stay in registers; the k-th largest
key is found bit by bit from the top, by counting the keys that are not below. :mod:`.long_rows_triton` does
longer rows.

A row of 1,024 values or more uses one streaming multiprocessor at most, so a batch with fewer rows than the GPU
has multiprocessors leaves some idle.
"""

import torch
import triton.language as tl
from torch import Tensor

from kwta_exp.activations.keys_triton import _jit, _keys, _kth, _least, _open, _values, _width
from kwta_exp.activations.long_rows_triton import _in_tiles

IN_REGISTERS = 1 << 15
"""The longest row that is held in registers: 32 values in each thread of the largest block."""

SAMPLE = 1 << 11
"""Values in the sample of a longer row."""

FEW = 1 << 12
"""Keys of a longer row that are searched in registers; at most the length of the row."""

_TOGETHER = 512
"""Values that one warp processes at once if rows are shorter."""

_WARPS = 16
"""Warps that process a longer row."""

_TILE = 1 << 15
"""Bytes of a longer row that are read at once."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def keep(rows: Tensor, k: int, by_magnitude: bool) -> tuple[Tensor, Tensor]:
    """Keep the ``k`` largest values of each row, and put 0 elsewhere.

    Args:
        rows: contiguous ``(N, M)`` in float32, float16 or bfloat16; not differentiated.
        k: the number of winners, ``1 <= k <= M``.
        by_magnitude: rank absolute values.

    Returns:
        The winners, ``(N, M)`` in the dtype of ``rows``: values not smaller than the k-th largest (or than
        infinity, if that is NaN), so all ties and NaN are kept (a zero may lose its sign). And uint8
        ``(N, ceil(M / 8))``: bit ``j % 8`` of ``[i, j // 8]`` is set if value j wins.

    Raises:
        ValueError: for unsupported ``rows``, or a ``k`` out of range.
    """
    N, M = _require(rows, k)
    winners = torch.empty_like(rows)
    bits = rows.new_empty((N, (M + 7) // 8), dtype=torch.uint8)
    _launch(rows, k, by_magnitude, (winners, bits, None, None))
    return winners, bits


def kth_largest(rows: Tensor, k: int) -> Tensor:
    """The k-th largest value of each row, ``(N, 1)``; NaN ranks above every number. See :func:`keep`."""
    N, M = _require(rows, k)
    thresholds = rows.new_empty((N, 1))
    candidates = torch.empty_like(rows) if M > IN_REGISTERS else None
    _launch(rows, k, False, (candidates, None, thresholds, None))
    return thresholds


def gate(rows: Tensor, k: int, by_magnitude: bool, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """``rows * sigmoid((s - t) / w)``: s the value or its magnitude, t the k-th largest s of the row.

    Args:
        rows: as for :func:`keep`.
        k: the rank of the threshold.
        by_magnitude: as for :func:`keep`.
        temperature: the width w of the gate, as a multiple of the standard deviation of s in the row.

    Returns:
        The gated values in the dtype of ``rows``; t (infinity for a NaN) and w, ``(N, 1)`` in float32.

    Raises:
        ValueError: as :func:`keep`.
    """
    N, _ = _require(rows, k)
    gated = torch.empty_like(rows)
    thresholds, widths = (rows.new_empty((N, 1), dtype=torch.float32) for _ in range(2))
    _launch(rows, k, by_magnitude, (gated, None, thresholds, widths), temperature)
    return gated, thresholds, widths


def pass_winners(gradients: Tensor, bits: Tensor) -> Tensor:
    """The ``gradients``, contiguous ``(N, M)``, of winners, and 0 elsewhere; see :func:`keep`."""
    passed = torch.empty_like(gradients)
    N, M = gradients.shape
    with torch.cuda.device_of(gradients):
        block = _block(M)
        _pass[(N, -(-M // block))](gradients, bits, passed, M, BLOCK=block)
    return passed


def pass_gate(
    gradients: Tensor, rows: Tensor, thresholds: Tensor, widths: Tensor, by_magnitude: bool
) -> Tensor:
    """The gradient of :func:`gate` for ``gradients``, contiguous ``(N, M)``: t moves, w is constant."""
    passed = torch.empty_like(gradients)
    N, M = gradients.shape
    with torch.cuda.device_of(gradients):
        block = _block(M)
        _pass_gate[(N,)](
            gradients, rows, thresholds, widths, passed, M,
            MAGNITUDE=by_magnitude, BLOCK=block, num_warps=max(1, block // 256),
        )  # fmt: skip
    return passed


def _block(size: int) -> int:
    """Values that a program of an elementwise kernel processes."""
    return min(4096, max(128, _power_of_two(size)))


def _power_of_two(size: int) -> int:
    """The smallest that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def _require(rows: Tensor, k: int) -> tuple[int, int]:
    if rows.dtype not in _DTYPES:
        raise ValueError(f"expected rows in float32, float16 or bfloat16, got {rows.dtype}")
    if rows.dim() != 2 or not rows.is_contiguous():
        raise ValueError(f"expected contiguous rows (N, M), got {tuple(rows.shape)}, strides {rows.stride()}")
    N, M = rows.shape
    if not 1 <= k <= M:
        raise ValueError(f"expected 1 <= k <= {M}, the length of a row, got k={k}")
    return N, M


_Outputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""What a kernel writes: winners or gated values (which long rows need as scratch space too), bits, thresholds,
widths. If there are widths, the values are gated."""


def _launch(rows: Tensor, k: int, by_magnitude: bool, outputs: _Outputs, temperature: float = 0.0) -> None:
    N, M = rows.shape
    with torch.cuda.device_of(rows):  # Triton launches on the current device, not on that of the arguments
        if M > IN_REGISTERS:
            across = 32 * _WARPS * 16 // rows.element_size()  # 16 bytes a thread
            _in_tiles[(N,)](
                rows, *outputs, None, k, M, temperature, MAGNITUDE=by_magnitude,
                SAMPLE=SAMPLE, FEW=FEW, DOWN=_TILE // (across * rows.element_size()), ACROSS=across,
                num_warps=_WARPS,
            )  # fmt: skip
            return
        block = max(8, _power_of_two(M))
        together = max(1, _TOGETHER // block)
        options = {"num_warps": max(1, block // 1024)}
        if block >= 1024:
            options["maxnreg"] = 64  # else twice as many registers, and half the warps at a time
        _in_registers[(-(-N // together),)](
            rows, *outputs, k, N, M, temperature, MAGNITUDE=by_magnitude,
            ROWS=together, BLOCK=block, **options,
        )  # fmt: skip


@_jit
def _in_registers(  # type: ignore[no-untyped-def]
    rows, values, bits, thresholds, widths, k, N, M, temperature,
    MAGNITUDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``ROWS`` short rows, or one long one, of at most ``BLOCK`` values."""
    DTYPE: tl.constexpr = rows.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    offset = row[:, None] * M + column[None, :]
    inside = (first + row < N)[:, None] & (column < M)[None, :]
    keys = _keys(tl.load(rows + first * M + offset, mask=inside, other=0), MAGNITUDE)
    keys = tl.where(inside, keys, 0)  # the smallest key, which is never counted

    bit = DTYPE.primitive_bitwidth - 1
    found = _kth(keys, tl.zeros([ROWS], tl.int32) + k, M, bit)
    left = inside & (keys >= found[:, None])
    found = tl.min(tl.where(left, keys, 0xFFFFFFFF), 1)
    if MAGNITUDE:
        found = (found >> 1) << 1  # the sign does not count

    here = first + row < N
    if widths is not None:
        x = tl.where(inside, _values(keys, DTYPE, MAGNITUDE).to(tl.float32), 0.0)
        score = tl.abs(x) if MAGNITUDE else x
        from_mean = tl.where(inside, score - (tl.sum(score, 1) / M)[:, None], 0.0)
        width = _width(tl.sum(from_mean * from_mean, 1), M, temperature)
        threshold = _values(_least(found, DTYPE), DTYPE, MAGNITUDE).to(tl.float32)
        tl.store(thresholds + first + row, threshold, mask=here)
        tl.store(widths + first + row, width, mask=here)
        # Part by part, and from the cache, because all at once needs more than 64 registers.
        PART: tl.constexpr = min(BLOCK, 4096)
        for start in range(0, M, PART):
            part = start + tl.arange(0, PART)
            place = first * M + row[:, None] * M + part[None, :]
            exists = here[:, None] & (part < M)[None, :]
            again = tl.load(rows + place, mask=exists, other=0).to(tl.float32)
            gated = again * _open(tl.abs(again) if MAGNITUDE else again, threshold[:, None], width[:, None])
            tl.store(values + place, gated.to(DTYPE), mask=exists)
    elif thresholds is not None:
        tl.store(thresholds + first + row, _values(found, DTYPE, MAGNITUDE), mask=here)
    else:
        wins = keys >= _least(found, DTYPE)[:, None]
        kept = tl.where(wins, _values(keys, DTYPE, MAGNITUDE), 0.0)
        tl.store(values + first * M + offset, kept, mask=inside)
        byte = tl.arange(0, BLOCK // 8)
        octets = tl.reshape((wins & inside).to(tl.int32), [ROWS, BLOCK // 8, 8])
        packed = tl.sum(octets << tl.arange(0, 8)[None, None, :], 2)
        bytes_in_row = (M + 7) // 8
        where = (first + row)[:, None] * bytes_in_row + byte[None, :]
        tl.store(bits + where, packed.to(tl.uint8), mask=here[:, None] & (byte < bytes_in_row)[None, :])


@_jit
def _pass(gradients, bits, passed, M, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < M
    flags = tl.load(bits + row * ((M + 7) // 8) + column // 8, mask=inside, other=0)
    gradient = tl.load(gradients + row * M + column, mask=inside)
    wins = ((flags.to(tl.int32) >> (column % 8)) & 1) != 0
    tl.store(passed + row * M + column, tl.where(wins, gradient, 0.0).to(gradient.dtype), mask=inside)


@_jit
def _pass_gate(  # type: ignore[no-untyped-def]
    gradients, rows, thresholds, widths, passed, M, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr
):
    """``g * o + (g * x - m) * o' / w`` with ``o = sigmoid((s - t) / w)``, m the mean of ``g * x`` by ``o'``."""
    row = tl.program_id(0).to(tl.int64)
    threshold, width = tl.load(thresholds + row), tl.load(widths + row)
    shares = tl.zeros([BLOCK], tl.float32)
    moves = tl.zeros([BLOCK], tl.float32)
    for start in range(0, M, BLOCK):
        inside, gradient, x, is_open = _gate_part(
            gradients, rows, row, start, M, threshold, width, MAGNITUDE, BLOCK
        )
        share = tl.where(inside, is_open * (1 - is_open), 0.0)
        shares += share
        moves += gradient * x * share
    mean = tl.sum(moves, 0) / tl.maximum(tl.sum(shares, 0), 1e-30)
    for start in range(0, M, BLOCK):
        inside, gradient, x, is_open = _gate_part(
            gradients, rows, row, start, M, threshold, width, MAGNITUDE, BLOCK
        )
        moved = (gradient * x - mean) * (is_open * (1 - is_open) / width)
        if MAGNITUDE:
            moved = tl.where(x < 0, -moved, tl.where(x > 0, moved, 0.0))
        result = (gradient * is_open + moved).to(passed.dtype.element_ty)
        tl.store(passed + row * M + start + tl.arange(0, BLOCK), result, mask=inside)


@_jit
def _gate_part(  # type: ignore[no-untyped-def]
    gradients, rows, row, start, M, threshold, width, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Of ``BLOCK`` values of a row from ``start`` on: which exist, gradients, values, how open gates are."""
    column = start + tl.arange(0, BLOCK)
    inside = column < M
    x = tl.load(rows + row * M + column, mask=inside, other=0).to(tl.float32)
    gradient = tl.load(gradients + row * M + column, mask=inside, other=0).to(tl.float32)
    return inside, gradient, x, _open(tl.abs(x) if MAGNITUDE else x, threshold, width)
