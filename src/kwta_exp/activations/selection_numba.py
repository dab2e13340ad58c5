"""CPU kernels that select the k largest values of each row: exact, without sorting, reading memory once.

A row becomes integer keys of the same order, which fit into the core's own cache. Each pass counts the keys
above three pivots, to narrow the interval that holds the threshold. The first pivots come from the previous
row, later ones from interpolation (Floyd and Rivest, "Expected time bounds for selection", CACM 1975). Once
the interval holds a few hundred keys, quickselect finds the threshold. The result is exact for any pivots;
bad ones only leave more keys to quickselect.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kwta_exp.activations.compiled import jit

_Array = npt.NDArray[Any]

FEW = 256
"""The number of keys at which quickselect takes over; shorter rows use it at once."""

_PASSES = 6
_SAMPLE = 512


@jit
def select(first, last, rows, k, infinity, by_magnitude, thresholds):  # type: ignore[no-untyped-def]
    """Find the k-th largest value of the rows from ``first`` up to ``last``.

    Args:
        first: the first row.
        last: the row after the last.
        rows: the bits of the values, signed integers ``(N, M)``.
        k: rank from the top, from 1 to M.
        infinity: the bits of infinity.
        by_magnitude: rank absolute values.
        thresholds: ``(N,)``, bits of the results; written to. A NaN may have other NaN bits.
    """
    space = _space(rows)
    guess = _NO_GUESS
    for row in range(first, last):
        _read(rows[row], infinity, by_magnitude, space[0])
        key, guess = _kth(space, k, infinity, guess)
        thresholds[row] = key if key >= 0 else np.iinfo(rows.dtype).min - key


@jit
def keep(first, last, rows, k, infinity, by_magnitude, winners, bits):  # type: ignore[no-untyped-def]
    """Write to ``winners`` the values that are not smaller than the k-th largest of their row, and 0 elsewhere.

    Arguments as for :func:`select`, and:
        winners: like ``rows``; written to.
        bits: uint8 ``(N, ceil(M / 8))``; written to. Bit ``j % 8`` of ``[i, j // 8]`` is set if value j wins.
    """
    space = _space(rows)
    keys, _, flags, words, _ = space
    guess = _NO_GUESS
    for row in range(first, last):
        _read(rows[row], infinity, by_magnitude, keys)
        key, guess = _kth(space, k, infinity, guess)
        _flag_from(keys, min(key, infinity), space)  # with a NaN as threshold, only NaN and infinity pass
        _pass_flagged(rows[row], flags, winners[row])
        _pack(words, bits[row])


@jit
def pass_winners(first, last, gradients, bits, passed):  # type: ignore[no-untyped-def]
    """Write to ``passed`` the ``gradients`` of winners, and 0 elsewhere; integers ``(N, M)``."""
    flags = np.empty(8 * bits.shape[1], np.uint8)
    words = flags.view(np.uint64)
    for row in range(first, last):
        _unpack(bits[row], words)
        _pass_flagged(gradients[row], flags, passed[row])


_NO_GUESS = (0.0, 0.0)


@jit
def _space(rows):  # type: ignore[no-untyped-def]
    """Scratch space for one row: keys, candidates, a flag byte per value (also as 8-byte words), pivots."""
    size = rows.shape[1]
    flags = np.zeros((size + 7) // 8 * 8, np.uint8)
    keys, some, pivots = np.empty(size, rows.dtype), np.empty(size, rows.dtype), np.empty(3, rows.dtype)
    return keys, some, flags, flags.view(np.uint64), pivots


@jit
def _read(row, infinity, by_magnitude, keys):  # type: ignore[no-untyped-def]
    """Integers in the order of the values; -0 equals +0, every NaN is ``infinity + 1``."""
    # Without these types Numba computes in 64 bits, which halves the vector width or worse.
    integer = keys.dtype.type
    magnitude, zero, nan = integer(np.iinfo(row.dtype).max), integer(0), integer(infinity + 1)
    for i in range(row.shape[0]):
        size = min(integer(row[i] & magnitude), nan)
        keys[i] = integer(-size) if (row[i] < zero) & (size < nan) & (not by_magnitude) else size


@jit
def _kth(space, k, infinity, guess):  # type: ignore[no-untyped-def]
    """The k-th largest key, and a guess for the next row: that key and the mean distance between ranks."""
    keys, some, _, _, pivots = space
    size = keys.shape[0]
    low, at_low = np.int64(-infinity), size  # so many keys are not below: k or more
    high, at_high = np.int64(infinity + 2), 0  # fewer than k
    middle, slope = guess
    spread = slope * size / 32

    for attempt in range(_PASSES):
        if at_low - at_high <= FEW or high - low == 1:
            break
        if at_low < size and at_high > 0:
            slope = (np.float64(high) - np.float64(low)) / (at_low - at_high)
            middle, spread = low + slope * (at_low - k), slope * (2 * math.sqrt(at_low - at_high) + 8)
            _around(middle, spread, infinity, pivots)
        elif attempt == 0 and slope > 0:
            _around(middle, spread, infinity, pivots)
        elif attempt < 3:
            _sampled(keys, k, 1.5 * 3**attempt, some, pivots)
        else:
            break
        counts = _count(keys, pivots)
        for which in range(3):
            pivot, count = pivots[which], counts[which]
            if count >= k:
                if pivot > low:
                    low, at_low = np.int64(pivot), count
            elif pivot < high:
                high, at_high = np.int64(pivot), count

    if at_low < size and at_high > 0:
        slope = (np.float64(high) - np.float64(low)) / (at_low - at_high)
    if high - low == 1:
        return low, (np.float64(low), slope)
    found = _between(low, high, space)
    key = np.int64(_quickselect(some, found, found - (k - at_high)))
    return key, (np.float64(key), slope)


@jit
def _around(middle, spread, infinity, pivots):  # type: ignore[no-untyped-def]
    bound = np.float64(infinity)
    pivots[0] = np.int64(min(max(middle - spread, -bound), bound))
    pivots[1] = np.int64(min(max(middle, -bound), bound))
    pivots[2] = np.int64(min(max(middle + spread + 1, -bound), bound))


@jit
def _sampled(keys, k, width, some, pivots):  # type: ignore[no-untyped-def]
    """Pivots from a sample: the expected threshold, and ``width`` standard deviations on both sides."""
    size = keys.shape[0]
    count = min(size, _SAMPLE)
    # Steps of the golden section: a regular step could hit the same channel or column every time.
    step, place = int(0.6180339887 * size) | 1, 0
    for i in range(count):
        some[i] = keys[place]
        place = (place + step) % size
    share = 1 - k / size
    deviation = math.sqrt(count * share * (1 - share))
    for which in range(3):
        rank = int(count * share + (which - 1) * (width * deviation + 1))
        pivots[which] = _quickselect(some, count, min(max(rank, 0), count - 1))


@jit
def _count(keys, pivots):  # type: ignore[no-untyped-def]
    """How many keys are not below each of three pivots."""
    at_a = at_b = at_c = 0
    for start in range(0, keys.shape[0], _BLOCK):
        a, b, c = _count_block(keys[start : start + _BLOCK], pivots[0], pivots[1], pivots[2])
        at_a += a
        at_b += b
        at_c += c
    return at_a, at_b, at_c


_BLOCK = 1 << 14  # such counts fit into 16 bits


@jit
def _count_block(keys, a, b, c):  # type: ignore[no-untyped-def]
    integer = keys.dtype.type
    at_a = at_b = at_c = integer(0)
    for i in range(keys.shape[0]):
        at_a = integer(at_a + integer(keys[i] >= a))
        at_b = integer(at_b + integer(keys[i] >= b))
        at_c = integer(at_c + integer(keys[i] >= c))
    return at_a, at_b, at_c


@jit
def _between(low, high, space):  # type: ignore[no-untyped-def]
    """Gather the keys from ``low`` to below ``high`` at the start of ``some``; return their number."""
    keys, some, flags, words, pivots = space
    pivots[0], pivots[1] = low, high
    lowest, above = pivots[0], pivots[1]
    for i in range(keys.shape[0]):
        flags[i] = np.uint8((keys[i] >= lowest) & (keys[i] < above))
    found = 0
    for word in range(words.shape[0]):
        if words[word] != 0:
            for i in range(8 * word, 8 * word + 8):
                if flags[i] != 0:
                    some[found] = keys[i]
                    found += 1
    return found


@jit
def _quickselect(values, count, position):  # type: ignore[no-untyped-def]
    """The value at ``position`` of the first ``count`` values in sorted order; reorders them (Hoare, 1961)."""
    left, right = 0, count - 1
    while left < right:
        first, middle, last = values[left], values[(left + right) // 2], values[right]
        pivot = max(min(first, middle), min(max(first, middle), last))
        i, j = left, right
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if position <= j:
            right = j
        elif position >= i:
            left = i
        else:
            break
    return values[position]


@jit
def _flag_from(keys, key, space):  # type: ignore[no-untyped-def]
    """Flag the keys that are at least ``key``."""
    _, _, flags, _, pivots = space
    pivots[0] = key
    threshold = pivots[0]
    for i in range(keys.shape[0]):
        flags[i] = np.uint8(keys[i] >= threshold)


@jit
def _pass_flagged(values, flags, out):  # type: ignore[no-untyped-def]
    for i in range(values.shape[0]):
        out[i] = values[i] if flags[i] != 0 else 0


_GATHER = np.uint64(0x0102040810204080)
_SPREAD = np.uint64(0x0101010101010101)
_DIAGONAL = np.uint64(0x8040201008040201)
_TOP = np.uint64(56)


@jit
def _pack(words, bits):  # type: ignore[no-untyped-def]
    """Eight flags of 0 or 1, a byte each, into one byte: the product moves byte i to bit 56 + i."""
    for i in range(words.shape[0]):
        bits[i] = (words[i] * _GATHER) >> _TOP


@jit
def _unpack(bits, words):  # type: ignore[no-untyped-def]
    """One byte into eight, of which byte i is not 0 where bit i was set."""
    for i in range(words.shape[0]):
        words[i] = (np.uint64(bits[i]) * _SPREAD) & _DIAGONAL
