"""CPU kernels that select the k largest values of each row: exact, without sorting, reading memory once.

A value has an integer key of the same order, computed in registers. One pass over a row counts the keys above
an interval that should hold the threshold, and gathers those inside. The interval comes from the previous row,
else from a sample (Floyd and Rivest, "Expected time bounds for selection", CACM 1975); it is narrowed among the
gathered keys, and bisected when few remain. A second pass over the row, which lies in the core's own cache now,
writes the winners. The result is exact for any interval; a bad one costs another pass.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kwta_exp.activations.vectors import (
    LANES,
    at_least,
    bits_set,
    fetch,
    fetch_to_write,
    load_word,
    lowest,
    pass_marked,
    store_word,
    stream_marked,
)
from kwta_exp.compiled import each_part, jit

_Array = npt.NDArray[Any]

FEW = 512
"""The number of values up to which an interval is bisected."""

_PASSES = 6
_SAMPLE = 512
_AHEAD = 1024  # values to load before they are needed; CPUs do not load across pages of 4 KiB by themselves


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
    order, highest = _order(rows, infinity, by_magnitude)
    space, guess = _space(rows), _NO_GUESS
    for row in range(first, last):
        key, guess = _kth(rows[row], k, order, highest, space, guess)
        key = _not_flushed(rows[row], k, key, order, infinity)
        if key == highest and _nans(rows[row], order, highest) >= k:
            key += 1
        thresholds[row] = _value(rows.dtype.type(key), order)


@jit
def keep(first, last, rows, k, infinity, by_magnitude, winners, bits, streamed):  # type: ignore[no-untyped-def]
    """Write to ``winners`` the values that are not smaller than the k-th largest of their row, and 0 elsewhere.

    Arguments as for :func:`select`, and:
        winners: like ``rows``; written to.
        bits: uint8 ``(N, ceil(M / 8))``; written to. Bit ``j % 8`` of ``[i, j // 8]`` is set if value j wins.
        streamed: write ``winners`` past the caches; each of its rows must start with a line of them.
    """
    order, highest = _order(rows, infinity, by_magnitude)
    space, guess = _space(rows), _NO_GUESS
    for row in range(first, last):
        key, guess = _kth(rows[row], k, order, highest, space, guess)
        key = _not_flushed(rows[row], k, key, order, infinity)
        _pass_from(rows[row], rows.dtype.type(key), order, winners[row], bits[row], streamed)


@jit
def pass_winners(first, last, gradients, bits, passed, streamed):  # type: ignore[no-untyped-def]
    """Write to ``passed`` the ``gradients`` of winners, and 0 elsewhere; integers ``(N, M)``.

    ``streamed`` as for :func:`keep`.
    """
    size, integer = gradients.shape[1], gradients.dtype.type
    whole = size - size % LANES
    for row in range(first, last):
        given, marks, out = gradients[row], bits[row], passed[row]
        for at in range(0, whole, LANES):
            fetch(given, at + _AHEAD)
            if streamed:
                stream_marked(given, at, load_word(marks, at // 8), out)
            else:
                fetch_to_write(out, at + _AHEAD)
                pass_marked(given, at, load_word(marks, at // 8), out)
        word = np.uint64(0)
        for byte in range(whole // 8, marks.shape[0]):
            word |= np.uint64(marks[byte]) << np.uint64(8 * (byte - whole // 8))
        for i in range(size - whole):
            out[whole + i] = given[whole + i] & -integer(word >> np.uint64(i) & np.uint64(1))


@jit
def select_parts(rows, parts, threads, *arguments):  # type: ignore[no-untyped-def]
    """:func:`select` in ``parts`` parts; as the next two for :func:`kwta_exp.compiled.on_threads`."""
    return each_part(select, rows, parts, threads, arguments)


@jit
def keep_parts(rows, parts, threads, *arguments):  # type: ignore[no-untyped-def]
    """:func:`keep` in ``parts`` parts."""
    return each_part(keep, rows, parts, threads, arguments)


@jit
def pass_parts(rows, parts, threads, *arguments):  # type: ignore[no-untyped-def]
    """:func:`pass_winners` in ``parts`` parts."""
    return each_part(pass_winners, rows, parts, threads, arguments)


_NO_GUESS = (0.0, 0.0, 0.0)
_LAST = np.uint64(1 << 63)


@jit
def _order(rows, infinity, by_magnitude):  # type: ignore[no-untyped-def]
    """What :func:`.vectors.at_least` needs to compute keys, and the key of infinity.

    All bits of a negative value but the sign are flipped, so that the integers have the order of the values.
    Then -infinity is moved to the least integer; negative NaNs, which lay below it, wrap around to the top.
    """
    integer = rows.dtype.type
    least, most = np.iinfo(rows.dtype).min, np.iinfo(rows.dtype).max
    shift = integer(least + infinity + 1)
    flip, kept = (integer(0), integer(most)) if by_magnitude else (integer(most), integer(-1))
    return (flip, kept, shift), np.int64(shift) + infinity


@jit
def _key(value, order):  # type: ignore[no-untyped-def]
    # In unsigned arithmetic, because a signed overflow is undefined.
    integer = type(value)
    flip, kept, shift = order
    if integer(np.uint64(value) << np.uint64(1)) == 0:  # 0 or -0
        return shift
    flipped = integer(value ^ flip if value < 0 else value) & kept
    return integer(np.uint64(flipped) + np.uint64(shift))


@jit
def _space(rows):  # type: ignore[no-untyped-def]
    """Two lists for candidates, small enough for a core's own cache and for memory that is mapped already."""
    return _two_lists(rows, max(rows.shape[1] // 8, min(rows.shape[1], FEW)))


@jit
def _two_lists(values, room):  # type: ignore[no-untyped-def]
    """Each with ``room`` elements, and as many more as are read at once."""
    return np.empty(room + LANES, values.dtype), np.empty(room + LANES, values.dtype)


@jit
def _kth(row, k, order, highest, space, guess):  # type: ignore[no-untyped-def]
    """The key of the k-th largest value, infinity if that is a NaN, and a guess for the next row.

    A guess is that key, its mean change from row to row, and the mean distance between ranks near it.
    """
    some, others = space
    size, least = row.shape[0], np.int64(np.iinfo(row.dtype).min)
    low, at_low = least, size  # so many keys are not below: k or more
    high, at_high = highest + 1, 0  # fewer than k; every NaN counts as infinity
    last, change, slope = guess

    if size <= FEW:
        for i in range(size):  # an assignment of slices takes 2.6 s to compile
            some[i] = row[i]
        return _bisected(some, size, k, low, high, order), guess

    # Narrow the interval in passes over the row, until it holds few enough to gather.
    room, width, found = some.shape[0] - LANES, 2.0, size
    for attempt in range(_PASSES):
        if high == low + 1:
            return low, (np.float64(low), change, slope)
        if attempt == _PASSES - 1:
            room = size
            some, others = _two_lists(row, size)
        from_guess = attempt == 0 and slope > 0
        if at_low - at_high <= room:
            start, stop = low, high
        elif from_guess:
            spread = min(4 * change, slope * size / 32) + 8 * slope
            start, stop = _around(last, spread, low, high)
        else:
            start, stop = _sampled(row, (low, at_low, high, at_high), k, width, order, highest, some)
        limit = room if stop > start + 1 else 0
        above, found = _gather(row, size, start, stop, highest, order, limit, some)
        if above < k <= above + found:
            low, at_low, high, at_high = start, above + found, stop, above
            if found <= limit:
                break
            continue
        if above >= k:
            low, at_low = stop, above
        else:
            high, at_high = start, above + found
        if not from_guess:
            width *= 3

    # Narrow it further among those gathered.
    base, between = at_high, found
    for _ in range(_PASSES):
        if between <= FEW or high == low + 1:
            break
        slope = np.float64(np.uint64(high) - np.uint64(low)) / between
        start, stop = _around(low + slope * (at_low - k), slope * (2 * math.sqrt(between) + 8), low, high)
        above, inside = _gather(some, found, start, stop, highest, order, found, others)
        above += base
        if above >= k:
            low, at_low = stop, above
        elif above + inside < k:
            high, at_high = start, above + inside
        else:
            low, at_low, high, at_high = start, above + inside, stop, above
            some, others, base, found = others, some, above, inside
        between = at_low - at_high
    if high > low + 1:
        slope = np.float64(np.uint64(high) - np.uint64(low)) / between
    key = _bisected(some, found, k - base, low, high, order)
    moved = abs(np.float64(key) - last)
    change = slope * math.sqrt(size) if guess[2] == 0 else change + (moved - change) / 4
    return key, (np.float64(key), change, slope)


@jit
def _not_flushed(row, k, key, order, infinity):  # type: ignore[no-untyped-def]
    """``key``, but counted by integers if it is that of a number so small that CPUs may take it for 0.

    They do so after ``torch.set_flush_denormal(True)``, and the row may hold 0 instead.
    """
    zero = np.int64(order[2])
    if row.itemsize < 4 or key == zero or abs(key - zero) >= infinity & -infinity:
        return key
    low, high = np.int64(np.iinfo(row.dtype).min), zero + infinity + 1
    while np.uint64(high) - np.uint64(low) > 1:
        middle = np.int64(np.uint64(low) + (np.uint64(high) - np.uint64(low)) // np.uint64(2))
        above = 0
        for i in range(row.shape[0]):
            above += _key(row[i], order) >= middle
        if above >= k:
            low = middle
        else:
            high = middle
    return low


@jit
def _around(middle, spread, low, high):  # type: ignore[no-untyped-def]
    """The integers from ``middle - spread`` to above ``middle + spread``, within ``low`` and ``high``."""
    least, most = np.float64(low), np.float64(high - 1)  # rounded, perhaps to outside of the interval
    start = np.int64(min(max(middle - spread, least), most))
    end = np.int64(min(max(middle + spread, least), most))
    return min(max(start, low), high - 1), min(max(end, low), high - 1) + 1


@jit
def _sampled(row, interval, k, width, order, highest, some):  # type: ignore[no-untyped-def]
    """Where a sample expects the threshold, and ``width`` standard deviations on both sides."""
    low, at_low, high, at_high = interval
    size = row.shape[0]
    # Steps of the golden section: a regular step could hit the same channel or column every time.
    step, place, drawn = int(0.6180339887 * size) | 1, 0, min(size // 8, _SAMPLE)
    for i in range(drawn):
        some[i] = row[place]
        place = (place + step) % size
    above = _at_least(some, drawn, high, order) if high <= highest else 0
    count = _at_least(some, drawn, low, order) - above
    if count == 0:
        return low, high
    share = (at_low - k) / (at_low - at_high)
    deviation = width * math.sqrt(count * share * (1 - share)) + 1
    first = min(max(int(count * share - deviation), 0), count - 1)
    last = min(max(int(count * share + deviation), 0), count - 1)
    start = _bisected(some, drawn, above + count - first, low, high, order)
    return start, _bisected(some, drawn, above + count - last, low, high, order) + 1


@jit
def _gather(values, count, start, stop, highest, order, limit, some):  # type: ignore[no-untyped-def]
    """Count the keys from ``stop`` on, and those from ``start`` to below ``stop``.

    If the latter are ``limit`` or fewer, ``some`` begins with their values. No key is above ``highest``.
    """
    integer = values.dtype.type
    closed = np.uint64(0) if stop > highest else ~np.uint64(0)
    lower, upper = integer(start), integer(min(stop, highest))
    above = found = 0
    whole = count - count % LANES
    for at in range(0, whole, LANES):
        fetch(values, at + _AHEAD)
        over, inside = _take(values, at, ~np.uint64(0), order, (lower, upper, closed), (found, limit), some)
        above += over
        found += inside
    if whole < count:  # a block that ends with the last value, of which some are in the block before
        at = max(count - LANES, 0)
        rest = (np.uint64(1) << np.uint64(count - whole)) - np.uint64(1)
        rest <<= np.uint64(whole - at)
        over, inside = _take(values, at, rest, order, (lower, upper, closed), (found, limit), some)
        above += over
        found += inside
    return above, found


@jit
def _take(values, at, counted, order, interval, filled, some):  # type: ignore[no-untyped-def]
    """:func:`_gather` for those of 64 values that are ``counted``; ``filled`` is (found, limit)."""
    lower, upper, closed = interval
    found, limit = filled
    over = at_least(values, at, order, upper) & closed & counted
    inside = at_least(values, at, order, lower) & counted & ~over
    number, place = bits_set(inside), min(found, limit)
    for have in range(2):  # mostly there are 0, 1 or 2: no branch, since the CPU could not predict it
        some[np.uint64(place)] = values[np.uint64(at + lowest(inside | _LAST))]
        inside &= inside - np.uint64(1)
        place += number > have
    if number > 2 and found + number <= limit:
        while inside != 0:
            some[place] = values[at + lowest(inside)]
            place += 1
            inside &= inside - np.uint64(1)
    return bits_set(over), number


@jit
def _bisected(values, count, k, low, high, order):  # type: ignore[no-untyped-def]
    """The key of the k-th largest of the first ``count`` values, ``low`` or more and below ``high``."""
    while np.uint64(high) - np.uint64(low) > 1:
        middle = np.int64(np.uint64(low) + (np.uint64(high) - np.uint64(low)) // np.uint64(2))
        if _at_least(values, count, middle, order) >= k:
            low = middle
        else:
            high = middle
    return low


@jit
def _at_least(values, count, key, order):  # type: ignore[no-untyped-def]
    """How many of the first ``count`` values have this key or a larger one; LANES more are read."""
    pivot, whole = values.dtype.type(key), count - count % LANES
    number = 0
    for at in range(0, whole, LANES):
        number += bits_set(at_least(values, at, order, pivot))
    rest = (np.uint64(1) << np.uint64(count - whole)) - np.uint64(1)
    return number + bits_set(at_least(values, whole, order, pivot) & rest)


@jit
def _pass_from(row, threshold, order, out, bits, streamed):  # type: ignore[no-untyped-def]
    """Write the values whose key is at least ``threshold``, and their bits."""
    size = row.shape[0]
    whole, even = size - size % LANES, size - size % 8
    for at in range(0, whole, LANES):
        marked = at_least(row, at, order, threshold)
        if streamed:
            stream_marked(row, at, marked, out)
        else:
            fetch_to_write(out, at + _AHEAD)
            pass_marked(row, at, marked, out)
        store_word(bits, at // 8, marked)
    if whole < even and size >= LANES:  # once more, but ending with the last whole byte of bits
        at = even - LANES
        marked = at_least(row, at, order, threshold)
        pass_marked(row, at, marked, out)
        store_word(bits, at // 8, marked)
        whole = even
    for at in range(whole, size, 8):
        byte = 0
        for i in range(at, min(at + 8, size)):
            if _key(row[i], order) >= threshold:
                byte |= 1 << (i - at)
                out[i] = row[i]
            else:
                out[i] = 0
        bits[at // 8] = byte


@jit
def _value(key, order):  # type: ignore[no-untyped-def]
    """The bits of the value with this key."""
    integer = type(key)
    flip, _, shift = order
    bits = integer(np.uint64(key) - np.uint64(shift))
    return integer(bits ^ flip if bits < 0 else bits)


@jit
def _nans(row, order, highest):  # type: ignore[no-untyped-def]
    """How many values are NaN."""
    count = 0
    for i in range(row.shape[0]):
        count += _key(row[i], order) > highest
    return count
