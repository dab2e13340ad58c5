"""The CPU kernel of keyed random numbers; see :mod:`kwta_exp.randomness` for the method."""

import numpy as np

from kwta_exp.compiled import each_part, jit

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFTS = tuple(np.uint64(bits) for bits in (30, 27, 31, 40))


@jit
def uniform(first, last, keys, out):  # type: ignore[no-untyped-def]
    """Write to float32 ``out``, ``(N, M)``, the numbers of the int64 ``keys`` from ``first`` up to ``last``."""
    to_24_bits = np.float32(2.0**-24)
    for row in range(first, last):
        key = np.uint64(keys[row])
        for i in range(out.shape[1]):
            z = key + np.uint64(i + 1) * _GOLDEN
            z = (z ^ (z >> _SHIFTS[0])) * _MIX_1
            z = (z ^ (z >> _SHIFTS[1])) * _MIX_2
            z ^= z >> _SHIFTS[2]
            out[row, i] = np.float32(np.int32(z >> _SHIFTS[3])) * to_24_bits


@jit
def uniform_parts(rows, parts, threads, *arguments):  # type: ignore[no-untyped-def]
    """:func:`uniform` in ``parts`` parts, for :func:`kwta_exp.compiled.on_threads`."""
    return each_part(uniform, rows, parts, threads, arguments)
