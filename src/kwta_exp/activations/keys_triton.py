"""What the GPU kernels of short and long rows share: values as sortable integers, and a search among them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import triton
import triton.language as tl

_jit: Callable[[Callable[..., Any]], Any] = partial(triton.jit, do_not_specialize=["k", "N"])


@_jit
def _keys(values, MAGNITUDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unsigned integers in the order of the values, NaN above all; invertible except for the sign of a zero.

    By magnitude, the lowest bit is the sign, which does not count. By value, minus infinity becomes 0 and NaN
    with a sign wrap around to the top. In both cases infinity becomes twice its bits.
    """
    DTYPE: tl.constexpr = values.dtype
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    ALL: tl.constexpr = (1 << BITS) - 1
    INFINITY: tl.constexpr = (1 << (BITS - 1)) - (1 << DTYPE.fp_mantissa_width)
    bits = values.to(tl.uint32 if BITS == 32 else tl.uint16, bitcast=True).to(tl.uint32)
    if MAGNITUDE:
        return ((bits << 1) | (bits >> (BITS - 1))) & ALL
    negative = 0 - (bits >> (BITS - 1))  # all ones, or 0
    magnitude = bits & (ALL >> 1)
    return (((magnitude ^ negative) - negative) + INFINITY) & ALL


@_jit
def _values(keys, DTYPE: tl.constexpr, MAGNITUDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inverse of :func:`_keys`."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    ALL: tl.constexpr = (1 << BITS) - 1
    INFINITY: tl.constexpr = (1 << (BITS - 1)) - (1 << DTYPE.fp_mantissa_width)
    if MAGNITUDE:
        bits = (keys >> 1) | ((keys & 1) << (BITS - 1))
    else:
        signed = (keys - INFINITY) & ALL
        negative = 0 - (signed >> (BITS - 1))
        bits = (((signed ^ negative) - negative) & (ALL >> 1)) | (negative & (1 << (BITS - 1)))
    return bits.to(tl.uint32 if BITS == 32 else tl.uint16).to(DTYPE, bitcast=True)


@_jit
def _least(found, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The smallest key that wins if the k-th largest is ``found``: the key of infinity for a NaN."""
    INFINITY: tl.constexpr = (1 << (DTYPE.primitive_bitwidth - 1)) - (1 << DTYPE.fp_mantissa_width)
    return tl.minimum(found, 2 * INFINITY)


@_jit
def _kth(keys, ranks, size, bit):  # type: ignore[no-untyped-def]
    """For each row of ``keys``, a number, not above the key that has the row's rank from the top.

    No other key is between the two. Found bit by bit, from number ``bit`` down, until in every row exactly
    ``rank`` keys are not below it. A row has ``size`` keys, and zeros, which are never counted.
    """
    found = tl.zeros_like(ranks).to(tl.uint32)
    count = tl.zeros_like(ranks) + size  # keys that are at least found
    while (bit >= 0) & (tl.max(count - ranks, 0) > 0):
        candidate = found | (tl.full(ranks.shape, 1, tl.uint32) << bit)
        at_candidate = tl.sum((keys >= candidate[:, None]).to(tl.int32), 1)
        found = tl.where(at_candidate >= ranks, candidate, found)
        count = tl.where(at_candidate >= ranks, at_candidate, count)
        bit -= 1
    return found


@_jit
def _width(squares, M, temperature):  # type: ignore[no-untyped-def]
    """The temperature times the standard deviation, which is kept above 0."""
    deviation = tl.sqrt(squares / tl.maximum(M - 1, 1))
    return tl.where(deviation < 1e-12, 1e-12, deviation) * temperature


@_jit
def _open(score, threshold, width):  # type: ignore[no-untyped-def]
    """The gate: near 1 well above the threshold, near 0 well below."""
    return tl.sigmoid((score - threshold) / width)
