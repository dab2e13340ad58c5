"""Vector instructions for Numba kernels: functions of 64 neighbouring values, in LLVM's own vectors.

LLVM splits them into the registers of the CPU that it compiles for. One bit for each value is a ``uint64``,
the lowest bit for the first value.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 64
"""Values computed at once."""

CACHE_LINE = 64
"""Bytes that come from memory together."""

typed_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic
_WORD = ir.IntType(64)
_FLOATS = {32: ir.FloatType(), 64: ir.DoubleType()}


@typed_intrinsic
def at_least(_: Any, values: Any, at: Any, order: Any, pivot: Any) -> Any:
    """Which of the 64 values from ``at`` have a key of ``pivot`` or more; every NaN has.

    ``values`` are the bits of floating point numbers. ``order`` is ``(flip, kept, shift)``, and the key of v is
    ``((v ^ (v >> 63 & flip)) & kept) + shift`` (for 64 bits), which wraps around; see ``selection_numba``. -0
    counts as 0. The ``pivot`` is not above the key of infinity. Numbers of 32 and 64 bits are compared as such.
    """
    number = values.dtype
    width = number.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, vector = _pointer(context, builder, signature, arguments, 0, 1)
        bits = builder.load(pointer, align=width // 8)
        flip, kept, shift = (builder.extract_value(arguments[2], place) for place in range(3))
        threshold, sign = arguments[3], ir.Constant(shift.type, width - 1)
        if width in _FLOATS:
            unflipped = builder.sub(threshold, shift)
            threshold = builder.xor(unflipped, builder.and_(builder.ashr(unflipped, sign), flip))
            floats = ir.VectorType(_FLOATS[width], LANES)
            size = builder.bitcast(builder.and_(bits, _filled(builder, vector, kept)), floats)
            least = builder.bitcast(_filled(builder, vector, threshold), floats)
            flags = builder.fcmp_unordered(">=", size, least)
        else:
            is_zero = builder.icmp_signed("==", threshold, shift)
            threshold = builder.sub(threshold, builder.zext(is_zero, shift.type))  # the key of -0
            flip, kept, shift, threshold, sign = (
                _filled(builder, vector, each) for each in (flip, kept, shift, threshold, sign)
            )
            flipped = builder.xor(bits, builder.and_(builder.ashr(bits, sign), flip))
            key = builder.add(builder.and_(flipped, kept), shift)
            flags = builder.icmp_signed(">=", key, threshold)
        return builder.bitcast(flags, _WORD)

    order = types.UniTuple(number, 3)  # type: ignore[no-untyped-call]
    return types.uint64(values, types.int64, order, number), generate


@typed_intrinsic
def pass_marked(_: Any, values: Any, at: Any, marked: Any, out: Any) -> Any:
    """Write to ``out``, from ``at``, the 64 values from ``at`` whose bit is set, and 0 for the others."""
    return types.void(values, types.int64, types.uint64, out), _pass_marked(past_caches=False)


@typed_intrinsic
def stream_marked(_: Any, values: Any, at: Any, marked: Any, out: Any) -> Any:
    """As :func:`pass_marked`, but past the caches; what is written must start with a line of them."""
    return types.void(values, types.int64, types.uint64, out), _pass_marked(past_caches=True)


def _pass_marked(past_caches: bool) -> Callable[..., Any]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, vector = _pointer(context, builder, signature, arguments, 0, 1)
        target, _ = _pointer(context, builder, signature, arguments, 3, 1)
        align = vector.element.width // 8
        flags = builder.bitcast(arguments[2], ir.VectorType(ir.IntType(1), LANES))
        passed = builder.select(flags, builder.load(pointer, align=align), ir.Constant(vector, None))
        if past_caches:
            hint = builder.module.add_metadata([ir.IntType(32)(1)])
            builder.store(passed, target, align=CACHE_LINE).set_metadata("nontemporal", hint)
        else:
            builder.store(passed, target, align=align)
        return context.get_dummy_value()

    return generate


@typed_intrinsic
def fetch(_: Any, values: Any, at: Any) -> Any:
    """Let the CPU load the 64 values from ``at``, to be read soon; they may lie outside of the array."""
    return types.void(values, types.int64), _prefetch(to_write=0)


@typed_intrinsic
def fetch_to_write(_: Any, values: Any, at: Any) -> Any:
    """As :func:`fetch`, but to be written soon."""
    return types.void(values, types.int64), _prefetch(to_write=1)


def _prefetch(to_write: int) -> Callable[..., Any]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, vector = _pointer(context, builder, signature, arguments, 0, 1)
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, *[ir.IntType(32)] * 3])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")  # type: ignore[no-untyped-call]
        write, near, data = (ir.IntType(32)(number) for number in (to_write, 3, 1))
        for offset in range(0, LANES * vector.element.width // 8, CACHE_LINE):
            builder.call(prefetch, [builder.gep(pointer, [_WORD(offset)]), write, near, data])
        return context.get_dummy_value()

    return generate


@typed_intrinsic
def load_word(_: Any, array: Any, at: Any) -> Any:
    """The eight bytes from ``at`` as one number, on little-endian CPUs the first byte lowest."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element(context, builder, signature, arguments, 0, arguments[1])
        return builder.load(builder.bitcast(pointer, _WORD.as_pointer()), align=1)

    return types.uint64(array, types.int64), generate


@typed_intrinsic
def store_word(_: Any, array: Any, at: Any, word: Any) -> Any:
    """Write eight bytes from ``at``, as :func:`load_word` reads them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = element(context, builder, signature, arguments, 0, arguments[1])
        builder.store(arguments[2], builder.bitcast(pointer, _WORD.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.uint64), generate


@typed_intrinsic
def lowest(_: Any, word: Any) -> Any:
    """The position of the lowest bit set in ``word``, which is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@typed_intrinsic
def bits_set(_: Any, word: Any) -> Any:
    """The number of bits set in ``word``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


def element(context: Any, builder: Any, signature: Any, arguments: Any, which: int, position: Any) -> Any:
    """A pointer to an element of the dense array that is argument number ``which``."""
    array = context.make_array(signature.args[which])(context, builder, arguments[which])
    return builder.gep(array.data, [position])


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any, which: int, at: int) -> Any:
    """A pointer to the 64 elements of array ``which`` from argument ``at`` on, and their vector type."""
    pointer = element(context, builder, signature, arguments, which, arguments[at])
    vector = ir.VectorType(pointer.type.pointee, LANES)
    return builder.bitcast(pointer, vector.as_pointer()), vector


def _filled(builder: Any, vector: Any, value: Any) -> Any:
    """A vector with ``value`` in every lane."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.IntType(32)(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), None))
