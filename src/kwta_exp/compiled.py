"""Compile CPU kernels with Numba and run them on torch's threads."""

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

SMALL = 1 << 16
"""Values for one thread: starting another takes longer than the work."""


def on_threads(work: Callable[..., int], shape: Sequence[int], threads: int, *arguments: Any) -> None:
    """Call a kernel for parts of the rows in parallel, on at most ``threads`` threads.

    Args:
        work: a kernel made by :func:`jit` that returns :func:`each_part` of another.
        shape: of the rows; the first is their number, the second the values of a row.
        threads: the largest number of threads, 1 or more.
        arguments: of the other kernel, after the first row and the row after the last.

    Raises:
        MemoryError: if a kernel fails, which can only be because it got no memory.
    """
    parts = max(1, min(threads, shape[0], shape[0] * shape[1] // SMALL))
    done = work(shape[0], parts, threads, *arguments)
    if interruption := _interruptions.pop(threading.get_ident(), None):
        raise interruption
    if done != parts:
        raise MemoryError("a CPU kernel got no memory for its lists")


_BYTES, _INT32, _INT64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)
_TASK = ir.FunctionType(ir.VoidType(), [_BYTES])
_COUNT, _PARTS, _NEXT, _DONE, _ARGUMENTS = range(5)  # of what is shared
_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic


@_intrinsic
def each_part(typing: Any, work: Any, count: Any, parts: Any, threads: Any, arguments: Any) -> Any:
    """Call ``work(first, last, *arguments)`` for ``parts`` parts of ``count`` rows; for kernels only.

    Each thread of a team takes the next part until there is none. None needs the GIL, for which Python's own
    threads wait: on two cores of an AMD EPYC that takes 40 to 60 us of each call. The team has as many threads
    as torch's, even where there are fewer parts: a team of another size ends threads and starts new ones.

    Returns:
        The number of parts that ended without an error.
    """
    called = work.get_call_type(typing, (types.int64, types.int64, *arguments.types), {})

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kernel = signature.args[0].dispatcher.overloads[called.args]
        context.active_code_library.add_linking_library(kernel.library)
        values = [builder.extract_value(given[4], place) for place in range(len(arguments.types))]
        initial = [given[1], given[2], _INT64(0), _INT64(0), *values]
        kind = ir.LiteralStructType([value.type for value in initial])
        shared = cgutils.alloca_once(builder, kind)  # type: ignore[no-untyped-call]
        for place, value in enumerate(initial):
            builder.store(value, cgutils.gep_inbounds(builder, shared, 0, place))  # type: ignore[no-untyped-call]
        task = ir.Function(builder.module, _TASK, builder.module.get_unique_name("task"))
        task.linkage = "internal"

        def call(inner: ir.IRBuilder, first: Any, last: Any, passed: list[Any]) -> Any:
            of = (kernel.fndesc, called, [first, last, *passed])
            return context.call_internal_no_propagate(inner, *of)[0].is_ok

        _take_parts(ir.IRBuilder(task.append_basic_block()), task.args[0], kind, call)
        whole = ir.FunctionType(ir.VoidType(), [_TASK.as_pointer(), _BYTES, _INT32, _INT32])
        team = cgutils.get_or_insert_function(builder.module, whole, _TEAM)  # type: ignore[no-untyped-call]
        data = builder.bitcast(shared, _BYTES)
        with builder.if_else(builder.icmp_signed(">", given[2], _INT64(1))) as (several, one):
            with several:
                builder.call(team, [task, data, builder.trunc(given[3], _INT32), _INT32(0)])
            with one:
                builder.call(task, [data])
        return builder.load(cgutils.gep_inbounds(builder, shared, 0, _DONE))  # type: ignore[no-untyped-call]

    return types.int64(work, types.int64, types.int64, types.int64, arguments), generate


def _take_parts(builder: ir.IRBuilder, data: Any, kind: Any, call: Callable[..., Any]) -> None:
    """Generate the task of a thread: to take the next part from what is shared, until there is none."""
    shared = builder.bitcast(data, kind.as_pointer())
    places = [builder.gep(shared, [_INT32(0), _INT32(place)]) for place in range(len(kind.elements))]
    count, parts = builder.load(places[_COUNT]), builder.load(places[_PARTS])
    passed = [builder.load(place) for place in places[_ARGUMENTS:]]
    head, body, end = (builder.append_basic_block(name) for name in ("head", "body", "end"))
    builder.branch(head)
    builder.position_at_end(head)
    part = builder.atomic_rmw("add", places[_NEXT], _INT64(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", part, parts), body, end)
    builder.position_at_end(body)
    first, last = (
        builder.sdiv(builder.mul(count, edge), parts) for edge in (part, builder.add(part, _INT64(1)))
    )
    ended = builder.zext(call(builder, first, last, passed), _INT64)
    builder.fence("seq_cst")  # what was written past the caches, too, before it counts as done
    builder.atomic_rmw("add", places[_DONE], ended, "monotonic")
    builder.branch(head)
    builder.position_at_end(end)
    builder.ret_void()


_TEAM = "kwta_exp_team"
"""The symbol of what calls a task on several threads at once: torch's own OpenMP threads if possible.

Idle OpenMP threads spin before they sleep, so a new thread would compete with them for a core. On two cores of
an AMD EPYC the OpenMP threads make the forward pass of (128, 64, 32, 32) in float32 1.5 times and a gradient of
ResNet-18 1.2 times as fast as new threads, and 1.3 and 1.07 times as fast as a thread pool. Numba's ``prange``
uses the same threads, but takes 3 more seconds to compile a kernel.
"""

_Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _new_threads(task: Callable[[int], None], data: int, threads: int, _: int) -> None:
    """As GNU's OpenMP library, on threads of Python.

    What Ctrl-C or a signal raises is kept for :func:`on_threads`: the kernel that called this must not return
    while other threads use its memory.
    """

    def shielded(step: Callable[..., None], *arguments: Any) -> None:
        try:
            step(*arguments)
        except BaseException as error:
            _interruptions[threading.get_ident()] = error

    others = [threading.Thread(target=task, args=(data,)) for _ in range(threads - 1)]
    for other in others:
        shielded(other.start)
    shielded(task, data)
    for other in others:
        while other.is_alive():
            shielded(other.join)


_interruptions: dict[int, BaseException] = {}
"""By the thread that called a kernel."""


def _team() -> Any:
    """The function of the OpenMP library that torch has loaded, if it is GNU's."""
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
    except (OSError, AttributeError):
        return ctypes.CFUNCTYPE(None, _Task, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)(_new_threads)


_team_function = _team()  # kept: a callback of ctypes lives as long as its object
binding.add_symbol(_TEAM, ctypes.cast(_team_function, ctypes.c_void_p).value)


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call, and cache the machine code beside the source if that folder is writable."""
    compiled: Any
    try:
        compiled = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no writable folder
        compiled = njit(nogil=True)(function)
    with suppress(AttributeError):  # Numba's own: it watches the file of the function alone
        index = compiled._cache._cache_file
        index._source_stamp = (index._source_stamp, _GENERATORS)
    kernel: Callable[..., Any] = compiled
    return kernel


_GENERATORS = tuple(
    sha256((Path(__file__).parent / name).read_bytes()).hexdigest()
    for name in ("compiled.py", "activations/vectors.py")
)
"""Of the files that generate machine code of functions in other files."""
