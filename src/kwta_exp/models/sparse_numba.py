"""CPU kernels of a convolution that skips zeros.

Each nonzero value is multiplied by a row of weights, one for every output channel, and added to each output
pixel in its window. 64 sums are held in registers at a time; accumulation is in float32.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kwta_exp.activations.vectors import LANES, element, lowest, typed_intrinsic
from kwta_exp.compiled import each_part, jit

ACCUMULATORS = 1 << 16
"""Sums that fit into a core's own cache."""

_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


@jit
def convolve(first, last, values, weight, bias, rows_to, columns_to, width, out):  # type: ignore[no-untyped-def]
    """Convolve the images from ``first`` up to ``last``.

    Args:
        first: the first image.
        last: the image after the last.
        values: the bits of the images, uint16 (bfloat16) or uint32 (float32), ``(N, H * W, C)``.
        weight: float32 ``(ceil(K / 64), R * S, C, 64)``, padded with zeros.
        bias: float32, padded likewise.
        rows_to: int64 ``(R, H)``: the output row to which row i contributes through row r of the kernel, or -1.
        columns_to: int64 ``(S, W)``, likewise.
        width: pixels in a row of the output.
        out: bits like ``values``, ``(N, P, K)``; written to.
    """
    channels, taps, pixels = values.shape[2], weight.shape[1], out.shape[1]
    block = max(1, ACCUMULATORS // (pixels * LANES))
    size = values.shape[1] * channels * block
    factors, rows = np.empty(size, np.float32), np.empty(size, np.int32)
    starts = np.empty(values.shape[1] * block + 1, np.int64)
    sums = np.empty(block * pixels * LANES, np.float32)
    weights = weight.reshape(-1)

    for image in range(first, last, block):
        images = min(block, last - image)
        _gather(values[image : image + images], factors.view(np.uint32), rows, starts)
        for chunk in range(weight.shape[0]):
            _fill(sums, bias[chunk * LANES : (chunk + 1) * LANES], images * pixels)
            for r in range(rows_to.shape[0]):
                for s in range(columns_to.shape[0]):
                    tap = chunk * taps + r * columns_to.shape[0] + s
                    _scatter(
                        factors, rows, starts, weights, tap * channels * LANES,
                        rows_to[r], columns_to[s], width, pixels, images, sums,
                    )  # fmt: skip
            _store(sums, out[image : image + images], chunk * LANES)


@jit
def convolve_parts(images, parts, threads, *arguments):  # type: ignore[no-untyped-def]
    """:func:`convolve` in ``parts`` parts, for :func:`kwta_exp.compiled.on_threads`."""
    return each_part(convolve, images, parts, threads, arguments)


@jit
def _gather(values, factors, rows, starts):  # type: ignore[no-untyped-def]
    """List the nonzero values: their float32 bits, the offset of their weights, and where each pixel starts."""
    images, pixels, channels = values.shape
    flat = values.reshape(-1)
    widen = np.uint32(32 - 8 * values.itemsize)
    found = 0
    for pixel in range(images * pixels):
        starts[pixel] = found
        at = pixel * channels
        for channel in range(0, channels - LANES + 1, LANES):
            left = _not_zero(flat, at + channel)
            while left != 0:
                which = channel + lowest(left)
                factors[found] = np.uint32(flat[at + which]) << widen
                rows[found] = which * LANES
                found += 1
                left &= left - np.uint64(1)
        for channel in range(channels - channels % LANES, channels):
            bits = np.uint32(flat[at + channel]) << widen
            if bits & np.uint32(0x7FFFFFFF):
                factors[found] = bits
                rows[found] = channel * LANES
                found += 1
    starts[images * pixels] = found


@jit
def _fill(sums, bias, pixels):  # type: ignore[no-untyped-def]
    for pixel in range(pixels):
        for lane in range(LANES):
            sums[pixel * LANES + lane] = bias[lane]


@jit
def _scatter(  # type: ignore[no-untyped-def]
    factors, rows, starts, weights, tap, row_to, column_to, width, pixels, images, sums
):
    """Add the contribution of one tap of the kernel."""
    pixel = 0
    for image in range(images):
        for i in range(row_to.shape[0]):
            to = (image * pixels + row_to[i] * width) * LANES
            for j in range(column_to.shape[0]):
                if row_to[i] >= 0 and column_to[j] >= 0:
                    here = to + column_to[j] * LANES
                    _add_rows(sums, here, weights, tap, rows, factors, starts[pixel], starts[pixel + 1])
                pixel += 1


@jit
def _store(sums, out, channel):  # type: ignore[no-untyped-def]
    """Round to the type of ``out``."""
    images, pixels, channels = out.shape
    flat, few = out.reshape(-1), np.empty(LANES, out.dtype)
    for pixel in range(images * pixels):
        to = pixel * channels + channel
        if channel + LANES <= channels:
            _round_to(sums, pixel * LANES, flat, to)
        else:
            _round_to(sums, pixel * LANES, few, 0)
            flat[to : to + channels - channel] = few[: channels - channel]


@typed_intrinsic
def _not_zero(_: Any, values: Any, at: Any) -> Any:
    """One bit for each of the 64 values from ``at``: whether it is neither 0 nor -0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element(context, builder, signature, arguments, 0, arguments[1])
        vector = ir.VectorType(pointer.type.pointee, LANES)
        bits = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=2)
        doubled = builder.add(bits, bits)  # drops the sign
        flags = builder.icmp_unsigned("!=", doubled, ir.Constant(vector, None))
        return builder.bitcast(flags, _INT64)

    return types.uint64(values, types.int64), generate


@typed_intrinsic
def _round_to(_: Any, sums: Any, at: Any, out: Any, to: Any) -> Any:
    """Write the 64 ``sums`` from ``at`` to ``out`` from ``to``; bfloat16 is rounded to nearest even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def same(number: int) -> Any:
            return ir.Constant(words, [number] * LANES)

        words = ir.VectorType(_INT32, LANES)
        pointer = element(context, builder, signature, arguments, 0, arguments[1])
        bits = builder.load(builder.bitcast(pointer, words.as_pointer()), align=4)
        target = element(context, builder, signature, arguments, 2, arguments[3])
        if target.type.pointee.width == 16:
            odd = builder.and_(builder.lshr(bits, same(16)), same(1))
            rounded = builder.add(bits, builder.add(odd, same(0x7FFF)))
            number = builder.icmp_unsigned("<=", builder.and_(bits, same(0x7FFFFFFF)), same(0x7F800000))
            bits = builder.lshr(builder.select(number, rounded, bits), same(16))
            bits = builder.trunc(bits, ir.VectorType(target.type.pointee, LANES))
        builder.store(bits, builder.bitcast(target, bits.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(sums, types.int64, out, types.int64), generate


@typed_intrinsic
def _add_rows(
    _: Any, sums: Any, at: Any, weights: Any, start: Any, rows: Any, factors: Any, begin: Any, end: Any
) -> Any:
    """Add to the 64 ``sums`` from ``at`` the sum, over i from ``begin`` to ``end``, of ``factors[i]`` times the
    64 ``weights`` from ``start + rows[i]``.

    As LLVM's vectors, because a loop over an array of sums would load and store them every time.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def place(which: int, position: Any) -> Any:
            return element(context, builder, signature, arguments, which, position)

        first, last = arguments[6], arguments[7]
        target = builder.bitcast(place(0, arguments[1]), _VECTOR.as_pointer())
        multiply_add = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32"
        )
        before = builder.load(target, align=4)
        entry = builder.block
        loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.cbranch(builder.icmp_signed("<", first, last), loop, done)

        builder.position_at_end(loop)
        i, sofar = builder.phi(_INT64), builder.phi(_VECTOR)
        row = builder.sext(builder.load(place(4, i)), _INT64)
        weight = place(2, builder.add(arguments[3], row))
        weight = builder.load(builder.bitcast(weight, _VECTOR.as_pointer()), align=4)
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        factor = builder.insert_element(undefined, builder.load(place(5, i)), _INT32(0))
        factor = builder.shuffle_vector(factor, undefined, ir.Constant(ir.VectorType(_INT32, LANES), None))
        added = builder.call(multiply_add, [factor, weight, sofar])
        following = builder.add(i, _INT64(1))
        i.add_incoming(first, entry)
        i.add_incoming(following, loop)
        sofar.add_incoming(before, entry)
        sofar.add_incoming(added, loop)
        builder.cbranch(builder.icmp_signed("<", following, last), loop, done)

        builder.position_at_end(done)
        after = builder.phi(_VECTOR)
        after.add_incoming(before, entry)
        after.add_incoming(added, loop)
        builder.store(after, target, align=4)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(sums, integer, weights, integer, rows, factors, integer, integer), generate
