"""The GPU kernel for rows that do not fit into registers: it reads a row three times, and a sample of it.

A random sample gives two keys that enclose the k-th largest: four standard deviations on both sides, so they
miss it in one row of ten thousand. The first read counts the keys above these two and one in the middle. The
second gathers those in between, which fit into registers (Floyd and Rivest, "Expected time bounds for
selection", CACM 1975). The third writes the winners.

If the sample misses, or more than ``FEW`` keys are in between (many ties, or rows longer than about 100,000
values), more reads count: one tells whether all are ties, two interpolate linearly, and the others quarter the
interval. So the result is exact for any sample, after about 22 reads at most. By the count of the tests, normal
values and the output of batch normalisation take 3 reads up to 65,536 values, seldom 4, and ties 2 to 4; rows
of 802,816 values take up to 5.

All but the first read come from the L2 cache, if it holds a row for each multiprocessor. The gathered keys lie
in the memory of the result, which the last read overwrites. A thread adds up its columns of the row alone.
"""

import triton.language as tl

from kwta_exp.activations.keys_triton import _jit, _keys, _kth, _least, _open, _values, _width


@_jit
def _in_tiles(  # type: ignore[no-untyped-def]
    rows, values, bits, thresholds, widths, reads, k, M, temperature,
    MAGNITUDE: tl.constexpr, SAMPLE: tl.constexpr, FEW: tl.constexpr,
    DOWN: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """One row of any length. ``reads``, for tests: how often the row was read."""
    DTYPE: tl.constexpr = rows.dtype.element_ty
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    TILE: tl.constexpr = DOWN * ACROSS
    row = tl.program_id(0).to(tl.int64)
    rows += row * M
    values += row * M
    candidates = values.to(tl.pointer_type(tl.uint32 if BITS == 32 else tl.uint16), bitcast=True)

    # The k-th largest key is from low to high. In each column so many keys are at least low, and above high.
    parts = (M + TILE - 1) // TILE
    low, high = tl.full([], 0, tl.uint32), tl.full([], (1 << BITS) - 1, tl.uint32)
    at_low, above = tl.zeros([ACROSS], tl.int32) + parts * DOWN, tl.zeros([ACROSS], tl.int32)
    between = parts * TILE
    a, b, c, mean = _enclose(rows, k, M, MAGNITUDE, SAMPLE)
    passes = 0
    while (low < high) & (between > FEW):
        at_a, at_b, above_c = _count(rows, a, b, c, M, MAGNITUDE, DOWN, ACROSS)
        from_a, from_b, from_c = tl.sum(at_a, 0) >= k, tl.sum(at_b, 0) >= k, tl.sum(above_c, 0) >= k
        low = tl.where(from_c, c + 1, tl.where(from_b, b, tl.where(from_a, a, low)))
        at_low = tl.where(from_c, above_c, tl.where(from_b, at_b, tl.where(from_a, at_a, at_low)))
        high = tl.where(from_c, high, tl.where(from_b, c, tl.where(from_a, b - 1, a - 1)))
        above = tl.where(from_c, above, tl.where(from_b, above_c, tl.where(from_a, at_b, at_a)))
        between = tl.sum(at_low - above, 0)
        passes += 1
        if passes <= 3:
            a, b, c = _interpolated(low, high, k - tl.sum(above, 0), between, DTYPE, MAGNITUDE)
            if passes == 1:
                a, c = low + 1, high - 1  # many ties are either at low or at high
        else:
            quarter = (high - low - 1) >> 2
            a = low + 1 + quarter
            b = a + quarter
            c = b + quarter - 1

    found = low
    if low < high:
        first = tl.cumsum(at_low - above, 0) - (at_low - above)
        _gather(rows, low, high, candidates, first, M, MAGNITUDE, TILE, ACROSS)
        found = low + _kth_of_few(candidates, low, high, k - tl.sum(above, 0), between, BITS, FEW)
        passes += 1
    if MAGNITUDE:
        found = (found >> 1) << 1
    least = _least(found, DTYPE)

    if widths is not None:
        width = _width(_squares(rows, mean, M, MAGNITUDE, DOWN, ACROSS), M, temperature)
        threshold = _values(least, DTYPE, MAGNITUDE).to(tl.float32)
        tl.store(thresholds + row, threshold)
        tl.store(widths + row, width)
        for start in tl.range(0, M, TILE, num_stages=3):
            column = start + tl.arange(0, TILE)
            x = tl.load(rows + column, mask=column < M, other=0).to(tl.float32)
            gated = x * _open(tl.abs(x) if MAGNITUDE else x, threshold, width)
            tl.store(values + column, gated.to(DTYPE), mask=column < M)
        passes += 2
    elif thresholds is not None:
        tl.store(thresholds + row, _values(found, DTYPE, MAGNITUDE))
    else:
        bytes_in_row = (M + 7) // 8
        bits += row * bytes_in_row
        for start in tl.range(0, M, TILE, num_stages=3):
            column = start + tl.arange(0, TILE)
            x = tl.load(rows + column, mask=column < M, other=0)
            wins = _keys(x, MAGNITUDE) >= least
            tl.store(values + column, tl.where(wins, x, 0.0), mask=column < M)
            byte = start // 8 + tl.arange(0, TILE // 8)
            octets = tl.reshape((wins & (column < M)).to(tl.int32), [TILE // 8, 8])
            packed = tl.sum(octets << tl.arange(0, 8)[None, :], 1)
            tl.store(bits + byte, packed.to(tl.uint8), mask=byte < bytes_in_row)
        passes += 1
    if reads is not None:
        tl.store(reads + row, passes)


@_jit
def _enclose(row, k, M, MAGNITUDE: tl.constexpr, SAMPLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """From a sample: a key probably below the k-th largest, one near it, one above it, and a mean of scores.

    Each of ``SAMPLE`` equal parts of the row gives one value, at a random place in it: a regular step could
    hit the same channel or column every time.
    """
    BITS: tl.constexpr = row.dtype.element_ty.primitive_bitwidth
    part = tl.arange(0, SAMPLE)
    place = (part.to(tl.uint32) + 1) * 0x9E3779B1
    place = (place ^ (place >> 16)) * 0x85EBCA6B
    place = (place ^ (place >> 13)) * 0xC2B2AE35
    within = ((place ^ (place >> 16)).to(tl.int64) * M) >> 32
    x = tl.load(row + (part.to(tl.int64) * M + within) // SAMPLE)
    score = tl.abs(x.to(tl.float32)) if MAGNITUDE else x.to(tl.float32)
    mean = tl.sum(score, 0) / SAMPLE

    share = k.to(tl.float32) / M
    middle = share * SAMPLE
    margin = 4 * tl.sqrt(middle * (1 - share)) + 2
    below = (middle + margin).to(tl.int32) + 1  # ranks from the top
    over = (middle - margin).to(tl.int32)
    which = tl.arange(0, 4)
    ranks = tl.where(which == 0, below, tl.where(which == 1, middle.to(tl.int32), over))
    ranks = tl.minimum(tl.maximum(ranks, 1), SAMPLE)
    keys = tl.broadcast_to(_keys(x, MAGNITUDE)[None, :], [4, SAMPLE])
    bit = BITS - 1
    found = _kth(keys, ranks, SAMPLE, bit)
    a = tl.sum(tl.where(which == 0, found, 0), 0)
    b = tl.sum(tl.where(which == 1, found, 0), 0)
    c = tl.sum(tl.where(which == 2, found, 0), 0)
    return a, b, c, mean


@_jit
def _interpolated(  # type: ignore[no-untyped-def]
    low, high, rank, between, DTYPE: tl.constexpr, MAGNITUDE: tl.constexpr
):
    """Keys just below, at, and just above where the rank would be if the values were uniform."""
    top = _values(high, DTYPE, MAGNITUDE).to(tl.float32)
    bottom = _values(low, DTYPE, MAGNITUDE).to(tl.float32)
    if MAGNITUDE:
        top, bottom = tl.abs(top), tl.abs(bottom)
    span = top - bottom
    middle = top - span * (rank.to(tl.float32) / between)
    a = _keys((middle - span / 16).to(DTYPE), MAGNITUDE)
    b = _keys(middle.to(DTYPE), MAGNITUDE)
    c = _keys((middle + span / 16).to(DTYPE), MAGNITUDE)
    # Inside the interval, whatever infinity and NaN have done: so every pass makes it smaller.
    a = tl.minimum(tl.maximum(a, low + 1), high)
    b = tl.minimum(tl.maximum(b, a), high)
    return a, b, tl.maximum(tl.minimum(c, high - 1), b - 1)


@_jit
def _gather(  # type: ignore[no-untyped-def]
    row, low, high, candidates, first, M, MAGNITUDE: tl.constexpr, TILE: tl.constexpr, ACROSS: tl.constexpr
):
    """Write the keys from ``low`` to ``high``, those of each column from its ``first`` place on."""
    KEY: tl.constexpr = candidates.dtype.element_ty
    for start in tl.range(0, (M + TILE - 1) // TILE * TILE, ACROSS, num_stages=5):
        keys = _keys(_padded(row, start + tl.arange(0, ACROSS), M, MAGNITUDE), MAGNITUDE)
        is_between = (keys >= low) & (keys <= high)
        tl.store(candidates + first, keys.to(KEY), mask=is_between)
        first += is_between.to(tl.int32)


@_jit
def _kth_of_few(  # type: ignore[no-untyped-def]
    candidates, low, high, rank, held, BITS: tl.constexpr, FEW: tl.constexpr
):
    """The key of that rank among the ``held`` candidates, which are from ``low`` to ``high``, minus ``low``."""
    tl.debug_barrier()  # other threads wrote what this one reads
    slot = tl.arange(0, FEW)
    keys = tl.load(candidates + slot, mask=slot < held, other=0).to(tl.uint32) - low
    keys = tl.where(slot < held, keys, 0)
    bit = BITS - 1
    while (bit > 0) & (((high - low) >> bit) == 0):
        bit -= 1
    found = _kth(keys[None, :], tl.zeros([1], tl.int32) + rank, held, bit)
    left = (slot < held) & (keys >= tl.sum(found, 0))
    key = tl.min(tl.where(left, keys, 0xFFFFFFFF), 0)
    tl.debug_barrier()  # what this thread has read will be overwritten
    return key


@_jit
def _count(  # type: ignore[no-untyped-def]
    row, a, b, c, M, MAGNITUDE: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr
):
    """In each of ``ACROSS`` columns, how many keys are at least ``a``, at least ``b``, and above ``c``."""
    at_a = tl.zeros([ACROSS], tl.int32)
    at_b = tl.zeros([ACROSS], tl.int32)
    above_c = tl.zeros([ACROSS], tl.int32)
    # Without num_stages Triton does not prefetch the next tiles.
    for start in tl.range(0, M, DOWN * ACROSS, num_stages=3):
        keys = _keys(_padded(row, start + _tile(DOWN, ACROSS), M, MAGNITUDE), MAGNITUDE)
        at_a += tl.sum((keys >= a).to(tl.int32), 0)
        at_b += tl.sum((keys >= b).to(tl.int32), 0)
        above_c += tl.sum((keys > c).to(tl.int32), 0)
    return at_a, at_b, above_c


@_jit
def _tile(DOWN: tl.constexpr, ACROSS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Places in a tile; one thread has all of a column, so that it adds them up alone."""
    return tl.arange(0, DOWN)[:, None] * ACROSS + tl.arange(0, ACROSS)[None, :]


@_jit
def _padded(row, column, M, MAGNITUDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of the row; beyond its end the smallest, which cannot change the k-th largest."""
    return tl.load(row + column, mask=column < M, other=0.0 if MAGNITUDE else float("-inf"))


@_jit
def _squares(  # type: ignore[no-untyped-def]
    row, mean, M, MAGNITUDE: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr
):
    """The sum of the squared distances of the scores from their mean, of which ``mean`` is an estimate."""
    total = tl.zeros([ACROSS], tl.float32)
    squares = tl.zeros([ACROSS], tl.float32)
    for start in tl.range(0, M, DOWN * ACROSS, num_stages=3):
        column = start + _tile(DOWN, ACROSS)
        x = tl.load(row + column, mask=column < M, other=0).to(tl.float32)
        from_mean = tl.where(column < M, (tl.abs(x) if MAGNITUDE else x) - mean, 0.0)
        total += tl.sum(from_mean, 0)
        squares += tl.sum(from_mean * from_mean, 0)
    error = tl.sum(total, 0)
    left = tl.sum(squares, 0) - error * (error / M)
    return tl.where(left < 0, 0.0, left)  # a NaN stays
