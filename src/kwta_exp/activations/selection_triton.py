"""GPU kernels that select the k largest values of each row: exact, without sorting.

A value becomes an unsigned integer of the same order, its key, which can be converted back (except for the
sign of a zero). Rows of up to ``IN_REGISTERS`` values are read once and stay in registers; the k-th largest
key is found bit by bit from the top, by counting the keys that are not below. Longer rows are read in tiles;
histograms of the keys' digits find it digit by digit, in three reads of the row (two in half precision), and
one more read writes the winners.

A row longer than that uses one streaming multiprocessor, so a batch with fewer rows than the GPU has
multiprocessors leaves some idle. Several programs per row would use them, but need one kernel per digit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

IN_REGISTERS = 1 << 15
"""The longest row that is held in registers: 32 values in each thread of the largest block."""

TILE = 1 << 13
"""Values of a longer row that are read at once; a power of two, at least the 512 threads."""

_TOGETHER = 512
"""Values that one warp processes at once if rows are shorter."""

_DTYPES = {
    torch.float32: (torch.uint32, 23),
    torch.float16: (torch.uint16, 10),
    torch.bfloat16: (torch.uint16, 7),
}
"""For each dtype, the unsigned integer of its size and the bits of its fraction."""


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
    winners = torch.empty_like(rows)
    bits = rows.new_empty(rows.shape[0], -(-rows.shape[-1] // 8), dtype=torch.uint8)
    _launch(rows, k, by_magnitude, winners, bits, None)
    return winners, bits


def kth_largest(rows: Tensor, k: int) -> Tensor:
    """The k-th largest value of each row, ``(N, 1)``; NaN ranks above every number. See :func:`keep`."""
    thresholds = rows.new_empty(rows.shape[0], 1)
    _launch(rows, k, False, None, None, thresholds)
    return thresholds


def pass_winners(gradients: Tensor, bits: Tensor) -> Tensor:
    """The ``gradients``, contiguous ``(N, M)``, of winners, and 0 elsewhere; see :func:`keep`."""
    passed = torch.empty_like(gradients)
    N, M = gradients.shape
    with torch.cuda.device_of(gradients):
        _pass[(N, triton.cdiv(M, 4096))](gradients, bits, passed, M, BLOCK=4096)
    return passed


def _launch(
    rows: Tensor,
    k: int,
    by_magnitude: bool,
    winners: Tensor | None,
    bits: Tensor | None,
    thresholds: Tensor | None,
) -> None:
    if rows.dtype not in _DTYPES:
        raise ValueError(f"expected rows in float32, float16 or bfloat16, got {rows.dtype}")
    if rows.dim() != 2 or not rows.is_contiguous():
        raise ValueError(f"expected contiguous rows (N, M), got {tuple(rows.shape)}, strides {rows.stride()}")
    N, M = rows.shape
    if not 1 <= k <= M:
        raise ValueError(f"expected 1 <= k <= {M}, the length of a row, got k={k}")

    integer, fraction = _DTYPES[rows.dtype]
    views = [t if t is None else t.detach().view(integer) for t in (rows, winners, thresholds)]
    tensors = views[0], views[1], bits, views[2]
    form = {"BITS": 8 * rows.element_size(), "FRACTION": fraction, "MAGNITUDE": by_magnitude}
    with torch.cuda.device_of(rows):  # Triton launches on the current device, not on that of the arguments
        if M <= IN_REGISTERS:
            block = max(8, triton.next_power_of_2(M))
            together = max(1, _TOGETHER // block)
            options = {"num_warps": max(1, block // 1024)}
            if block >= 1024:
                options["maxnreg"] = 64  # else twice as many registers, and half the warps at a time
            _in_registers[(triton.cdiv(N, together),)](
                *tensors, k, N, M, **form, ROWS=together, BLOCK=block, **options
            )
        else:
            _in_tiles[(N,)](*tensors, k, M, **form, TILE=TILE, num_warps=16)


_jit: Callable[[Callable[..., Any]], Any] = partial(triton.jit, do_not_specialize=["k", "N"])


@_jit
def _in_registers(  # type: ignore[no-untyped-def]
    rows, winners, bits, thresholds, k, N, M,
    BITS: tl.constexpr, FRACTION: tl.constexpr, MAGNITUDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``ROWS`` short rows, or one long one, of at most ``BLOCK`` values."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    offset = row[:, None] * M + column[None, :]
    inside = (first + row < N)[:, None] & (column < M)[None, :]
    keys = _keys(tl.load(rows + first * M + offset, mask=inside, other=0), BITS, FRACTION, MAGNITUDE)
    keys = tl.where(inside, keys, 0)  # the smallest key, which is never counted

    found = tl.zeros([ROWS], tl.uint32)
    count = tl.zeros([ROWS], tl.int32) + M  # keys that are at least found
    bit = BITS - 1
    # Once exactly k are left in every row, the smallest of them is the k-th largest.
    while (bit >= (1 if MAGNITUDE else 0)) & (tl.max(count, 0) > k):
        candidate = found | (tl.full([ROWS], 1, tl.uint32) << bit)
        at_candidate = tl.sum((keys >= candidate[:, None]).to(tl.int32), 1)
        found = tl.where(at_candidate >= k, candidate, found)
        count = tl.where(at_candidate >= k, at_candidate, count)
        bit -= 1
    left = inside & (keys >= found[:, None])
    found = tl.min(tl.where(left, keys, 0xFFFFFFFF), 1)

    here = first + row < N
    if MAGNITUDE:
        found = (found >> 1) << 1  # the sign does not count
    if thresholds is not None:
        value = _bits(found, BITS, FRACTION, MAGNITUDE)
        tl.store(thresholds + first + row, value.to(thresholds.dtype.element_ty), mask=here)
    if winners is not None:
        wins = keys >= _least(found, BITS, FRACTION, MAGNITUDE)[:, None]
        kept = tl.where(wins, _bits(keys, BITS, FRACTION, MAGNITUDE), 0)
        tl.store(winners + first * M + offset, kept.to(winners.dtype.element_ty), mask=inside)
        byte = tl.arange(0, BLOCK // 8)
        octets = tl.reshape((wins & inside).to(tl.int32), [ROWS, BLOCK // 8, 8])
        packed = tl.sum(octets << tl.arange(0, 8)[None, None, :], 2)
        width = (M + 7) // 8
        where = (first + row)[:, None] * width + byte[None, :]
        tl.store(bits + where, packed.to(tl.uint8), mask=here[:, None] & (byte < width)[None, :])


@_jit
def _in_tiles(  # type: ignore[no-untyped-def]
    rows, winners, bits, thresholds, k, M,
    BITS: tl.constexpr, FRACTION: tl.constexpr, MAGNITUDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One row of any length."""
    row = tl.program_id(0).to(tl.int64)
    rows += row * M
    if BITS == 32:
        found, rank = _digit(rows, 0, k, M, 21, 11, BITS, FRACTION, MAGNITUDE, TILE)
        found, rank = _digit(rows, found, rank, M, 10, 11, BITS, FRACTION, MAGNITUDE, TILE)
        found, rank = _digit(rows, found, rank, M, 0, 10, BITS, FRACTION, MAGNITUDE, TILE)
    else:
        found, rank = _digit(rows, 0, k, M, 8, 8, BITS, FRACTION, MAGNITUDE, TILE)
        found, rank = _digit(rows, found, rank, M, 0, 8, BITS, FRACTION, MAGNITUDE, TILE)

    if MAGNITUDE:
        found = (found >> 1) << 1
    if thresholds is not None:
        value = _bits(found, BITS, FRACTION, MAGNITUDE)
        tl.store(thresholds + row, value.to(thresholds.dtype.element_ty))
    if winners is not None:
        least = _least(found, BITS, FRACTION, MAGNITUDE)
        width = (M + 7) // 8
        winners += row * M
        bits += row * width
        for start in tl.range(0, M, TILE, num_stages=3):
            column = start + tl.arange(0, TILE)
            keys = _keys(tl.load(rows + column, mask=column < M, other=0), BITS, FRACTION, MAGNITUDE)
            wins = keys >= least
            kept = tl.where(wins, _bits(keys, BITS, FRACTION, MAGNITUDE), 0)
            tl.store(winners + column, kept.to(winners.dtype.element_ty), mask=column < M)
            byte = start // 8 + tl.arange(0, TILE // 8)
            octets = tl.reshape((wins & (column < M)).to(tl.int32), [TILE // 8, 8])
            packed = tl.sum(octets << tl.arange(0, 8)[None, :], 1)
            tl.store(bits + byte, packed.to(tl.uint8), mask=byte < width)


@_jit
def _digit(  # type: ignore[no-untyped-def]
    row, found, rank, M, SHIFT: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr, FRACTION: tl.constexpr, MAGNITUDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Find the next ``WIDTH`` bits of the k-th largest key, after the bits in ``found``.

    Returns the bits so far, and the rank among the keys that start with them.
    """
    counts = tl.zeros([1 << WIDTH], tl.int32)
    # Without num_stages Triton does not prefetch the next tiles.
    for start in tl.range(0, M, TILE, num_stages=3):
        column = start + tl.arange(0, TILE)
        keys = _keys(tl.load(row + column, mask=column < M, other=0), BITS, FRACTION, MAGNITUDE)
        here = column < M
        if SHIFT + WIDTH < BITS:
            here &= (keys >> (SHIFT + WIDTH)) == found
        digits = ((keys >> SHIFT) & ((1 << WIDTH) - 1)).to(tl.int32)
        counts += tl.histogram(digits, 1 << WIDTH, mask=here)
    from_here = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum((from_here >= rank).to(tl.int32), 0) - 1
    rank -= tl.sum(tl.where(tl.arange(0, 1 << WIDTH) > digit, counts, 0), 0)
    return (found << WIDTH) | digit.to(tl.uint32), rank


@_jit
def _keys(bits, BITS: tl.constexpr, FRACTION: tl.constexpr, MAGNITUDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Integers in the order of the values, NaN above all; invertible except for the sign of a zero.

    By magnitude, the lowest bit is the sign, which does not count. By value, negative numbers are reversed
    and minus infinity becomes 0, so NaN with a sign wrap around to the top.
    """
    SIGN: tl.constexpr = 1 << (BITS - 1)
    ALL: tl.constexpr = (1 << BITS) - 1
    bits = bits.to(tl.uint32)
    if MAGNITUDE:
        return ((bits << 1) | (bits >> (BITS - 1))) & ALL
    bits = tl.where(bits == SIGN, 0, bits)
    ordered = bits ^ tl.where(bits >= SIGN, ALL, SIGN)
    return (ordered - ((1 << FRACTION) - 1)) & ALL


@_jit
def _bits(keys, BITS: tl.constexpr, FRACTION: tl.constexpr, MAGNITUDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inverse of :func:`_keys`."""
    SIGN: tl.constexpr = 1 << (BITS - 1)
    ALL: tl.constexpr = (1 << BITS) - 1
    if MAGNITUDE:
        return (keys >> 1) | ((keys & 1) << (BITS - 1))
    ordered = (keys + ((1 << FRACTION) - 1)) & ALL
    return ordered ^ tl.where(ordered >= SIGN, SIGN, ALL)


@_jit
def _least(found, BITS: tl.constexpr, FRACTION: tl.constexpr, MAGNITUDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The smallest key that wins if the k-th largest is ``found``: the key of infinity for a NaN."""
    SIGN: tl.constexpr = 1 << (BITS - 1)
    INFINITY: tl.constexpr = SIGN - (1 << FRACTION)
    top: tl.constexpr = 2 * INFINITY if MAGNITUDE else SIGN + INFINITY - ((1 << FRACTION) - 1)
    return tl.where(found > top, top, found)


@triton.jit  # type: ignore[untyped-decorator]
def _pass(gradients, bits, passed, M, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < M
    flags = tl.load(bits + row * ((M + 7) // 8) + column // 8, mask=inside, other=0)
    gradient = tl.load(gradients + row * M + column, mask=inside)
    wins = ((flags.to(tl.int32) >> (column % 8)) & 1) != 0
    tl.store(passed + row * M + column, tl.where(wins, gradient, 0.0).to(gradient.dtype), mask=inside)
