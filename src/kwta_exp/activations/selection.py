"""The k largest values of each row, as operators of torch with a kernel for each device.

``keep`` zeroes the losers and records the winners in one bit each, ``pass_winners`` is its gradient, and
``kth_largest`` returns only the threshold. ``torch.compile`` treats them as opaque, without a graph break.
The CPU kernels use Numba (:mod:`.selection_numba`), the CUDA kernels Triton (:mod:`.selection_triton`).
Under ``torch.func`` and in forward mode, PyTorch's own operators do the work.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kwta_exp import allocator
from kwta_exp.activations.layout import _laid_out, _on_its_own_layout, _rows, in_channels_last

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])

# Not torch.library.custom_op, which imports the compiler (2 s) at the first call.
torch.library.define(
    "kwta_exp::keep", "(Tensor x, int k, bool per_channel, bool by_magnitude) -> (Tensor, Tensor)"
)
torch.library.define("kwta_exp::pass_winners", "(Tensor gradient, Tensor bits, bool channels_last) -> Tensor")
torch.library.define("kwta_exp::kth_largest", "(Tensor rows, int k) -> Tensor")


def _implements(operator: str, device: str) -> Callable[[_Kernel], _Kernel]:
    """As ``torch.library.impl``, but the function stays callable by its name."""

    def register(kernel: _Kernel) -> _Kernel:
        torch.library.impl(operator, device, kernel)
        return kernel

    return register


_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}

_keep = torch.ops.kwta_exp.keep.default
_pass = torch.ops.kwta_exp.pass_winners.default

HUGE = 4 << 20
"""Bytes from which a tensor's memory may be new: always from 32 MiB on, below if some was just returned."""

STREAMED = 16 << 20
"""Bytes of an output from which it is written past the caches."""


def keep(x: Tensor, k: int, per_channel: bool, by_magnitude: bool) -> Tensor:
    """Zero the values that are smaller than the k-th largest value of their row.

    Args:
        x: floating point ``(N, ...)`` of 2 to 5 dimensions, not empty.
        k: rank from the top, from 1 to the length of a row.
        per_channel: a row is a channel of a sample, of 3 dimensions or more; else it is a sample.
        by_magnitude: rank absolute values.

    Returns:
        A tensor like ``x``, in its memory format. NaN ranks above every number and is kept; where it is the
        k-th largest, nothing finite is kept. The gradient passes through the kept values; backward saves one
        bit per value. ``torch.func`` and forward mode are supported.

    Raises:
        TypeError: for a dtype other than float16, bfloat16, float32 and float64.
        ValueError: for a ``k`` out of range, or an empty ``x``.
    """
    if x.dtype not in _BITS:
        raise TypeError(f"k-WTA expects float16, bfloat16, float32 or float64, got {x.dtype}")
    if torch.compiler.is_compiling():
        kept: Tensor = torch.ops.kwta_exp.keep(x, k, per_channel, by_magnitude)[0]
    elif under_transform():
        kept = _keep_by_topk(x, k, per_channel, by_magnitude)
    elif torch.is_grad_enabled() and x.requires_grad:
        kept = _Keep.apply(x, k, per_channel, by_magnitude)
    else:
        kept = below_autograd(_keep, x, k, per_channel, by_magnitude)[0]
    return kept


def under_transform() -> bool:
    """Whether ``torch.func`` or forward mode is active: they do not use the autograd formula of an operator."""
    return torch._C._are_functorch_transforms_active() or bool(forward_ad._current_level >= 0)


def _keep_by_topk(x: Tensor, k: int, per_channel: bool, by_magnitude: bool) -> Tensor:
    """:func:`keep` in PyTorch's operators, which have the rules for every transform."""
    score = x.detach().abs() if by_magnitude else x.detach()
    rows = score.flatten(2 if per_channel else 1)
    threshold = rows.topk(k, dim=-1).values[..., -1:]
    losers = rows < threshold.masked_fill(threshold.isnan(), torch.inf)
    return x.masked_fill(losers.reshape(x.shape), 0)


def kth_largest(rows: Tensor, k: int) -> Tensor:
    """The k-th largest value of each row.

    Args:
        rows: floating point ``(N, M)``; not differentiated.
        k: rank from the top, ``1 <= k <= M``.

    Returns:
        ``(N, 1)`` in the dtype of ``rows``. NaN ranks above every number, as in ``torch.topk``.

    Raises:
        TypeError, ValueError: as :func:`keep`.
    """
    selected: Tensor = torch.ops.kwta_exp.kth_largest(rows, k)
    return selected


def below_autograd(operator: Callable[..., Any], *arguments: Any) -> Any:
    """Call an operator without its autograd formula, which torch.library applies in 40 us of Python.

    Dispatch modes and subclasses of tensors see the call.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _integers(x: Tensor) -> Any:
    """The bits of ``x`` as NumPy integers; shares memory."""
    return x.view(_BITS[x.dtype]).numpy()


@cache
def _infinity(dtype: torch.dtype) -> int:
    return int(torch.tensor(torch.inf, dtype=dtype).view(_BITS[dtype]))


@torch.library.impl("kwta_exp::keep", "CPU")
def _keep_on_cpu(x: Tensor, k: int, per_channel: bool, by_magnitude: bool) -> tuple[Tensor, Tensor]:
    from kwta_exp.activations import selection_numba
    from kwta_exp.compiled import on_threads

    dense, _ = _on_its_own_layout(x, per_channel)
    rows = _rows(dense, per_channel=per_channel)
    _require(k, rows)
    kept = _fresh_like(dense)
    bits = torch.empty(len(rows), -(-rows.shape[1] // 8), dtype=torch.uint8)
    on_threads(
        selection_numba.keep_parts,
        rows.shape,
        torch.get_num_threads(),
        _integers(rows), k, _infinity(x.dtype), by_magnitude,
        _integers(_rows(kept, per_channel=per_channel)), bits.numpy(), _streamed(kept, len(rows)),
    )  # fmt: skip
    return _laid_out(kept, in_channels_last(x)), bits


@torch.library.impl("kwta_exp::pass_winners", "CPU")
def _pass_on_cpu(gradient: Tensor, bits: Tensor, channels_last: bool) -> Tensor:
    from kwta_exp.activations import selection_numba
    from kwta_exp.compiled import on_threads

    gradient = _laid_out(gradient.detach(), channels_last)
    passed = _fresh_like(gradient)
    rows = _rows(gradient, bits)
    on_threads(
        selection_numba.pass_parts,
        rows.shape,
        torch.get_num_threads(),
        _integers(rows), bits.numpy(), _integers(_rows(passed, bits)), _streamed(passed, len(rows)),
    )  # fmt: skip
    return passed


@torch.library.impl("kwta_exp::kth_largest", "CPU")
def _select_on_cpu(rows: Tensor, k: int) -> Tensor:
    from kwta_exp.activations import selection_numba
    from kwta_exp.compiled import on_threads

    rows = rows.detach().contiguous()
    _require(k, rows)
    selected = rows.new_empty(len(rows), 1)
    on_threads(
        selection_numba.select_parts,
        rows.shape,
        torch.get_num_threads(),
        _integers(rows), k, _infinity(rows.dtype), False, _integers(selected)[:, 0],
    )  # fmt: skip
    return selected


def _require(k: int, rows: Tensor) -> None:
    """Check the arguments of a kernel.

    Raises:
        ValueError: for a ``k`` out of range.
        TypeError: for an unsupported dtype.
    """
    if not 1 <= k <= rows.shape[1]:
        raise ValueError(f"k={k}; expected 1 to {rows.shape[1]}, the values of a row")
    if rows.dtype not in _BITS:
        raise TypeError(f"the k-th largest: expected float16, bfloat16, float32 or float64, got {rows.dtype}")


def _streamed(out: Tensor, rows: int) -> bool:
    """Whether to write ``out`` past the caches, from which the next layer would find little of it anyway.

    Then it need not be read first, a third of what a layer moves. On two cores of an AMD EPYC with 32 MiB of
    shared cache, a layer and the next that reads its output take 0.92 times as long at 16 MiB, as long at
    12 MiB, and 1.2 times as long at 8 MiB.
    """
    from kwta_exp.activations.vectors import CACHE_LINE

    size = out.nbytes
    return size >= STREAMED and size // rows % CACHE_LINE == 0 and out.data_ptr() % CACHE_LINE == 0


def _fresh_like(x: Tensor) -> Tensor:
    """An uninitialised tensor like ``x``, in huge pages if it is so large that its memory may be newly mapped.

    Mapping 4 KiB at a time takes longer than the selection. Systems without huge pages ignore the request, and
    for memory that is mapped already it changes nothing. Where :mod:`kwta_exp.allocator` keeps memory, none is
    mapped anew, and each is asked for once.
    """
    fresh = torch.empty_like(x)
    size = fresh.nbytes
    if size >= HUGE and _madvise is not None:
        at = fresh.data_ptr()
        if (at, size) not in _asked:
            start, end = -(-at // _HUGE_PAGE) * _HUGE_PAGE, (at + size) // _HUGE_PAGE * _HUGE_PAGE
            _madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)
            if allocator.keeps:
                _asked.add((at, size))
    return fresh


_asked: set[tuple[int, int]] = set()
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # Linux's number
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


@_implements("kwta_exp::keep", "CUDA")
def _keep_on_cuda(x: Tensor, k: int, per_channel: bool, by_magnitude: bool) -> tuple[Tensor, Tensor]:
    dense, _ = _on_its_own_layout(x.detach(), per_channel)
    rows = _rows(dense, per_channel=per_channel)
    if x.dtype == torch.float64:  # rare (a confirmation by the judge), so torch.topk is fast enough
        score = rows.abs() if by_magnitude else rows
        threshold = score.topk(k, dim=1).values[:, -1:]
        lost = score < threshold.masked_fill(threshold.isnan(), torch.inf)
        kept, bits = rows.masked_fill(lost, 0), _packed(~lost)
    else:
        from kwta_exp.activations import selection_triton

        kept, bits = selection_triton.keep(rows, k, by_magnitude)
    return _laid_out(kept.as_strided(dense.shape, dense.stride()), in_channels_last(x)), bits


@_implements("kwta_exp::pass_winners", "CUDA")
def _pass_on_cuda(gradient: Tensor, bits: Tensor, channels_last: bool) -> Tensor:
    from kwta_exp.activations import selection_triton

    gradient = _laid_out(gradient.detach(), channels_last)
    passed = selection_triton.pass_winners(_rows(gradient, bits), bits)
    return passed.as_strided(gradient.shape, gradient.stride())


@_implements("kwta_exp::kth_largest", "CUDA")
def _select_on_cuda(rows: Tensor, k: int) -> Tensor:
    if rows.dtype == torch.float64:
        selected: Tensor = rows.topk(k, dim=1).values[:, -1:].clone()
        return selected
    from kwta_exp.activations import selection_triton

    return selection_triton.kth_largest(rows.contiguous(), k)


def _packed(flags: Tensor) -> Tensor:
    """Bool ``(N, M)`` to uint8 ``(N, ceil(M / 8))``, the lowest bit first."""
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[1] % 8)).unflatten(1, (-1, 8))
    weights = 2 ** torch.arange(8, device=flags.device, dtype=torch.uint8)
    packed: Tensor = (padded * weights).sum(2, dtype=torch.uint8)
    return packed


@torch.library.register_fake("kwta_exp::keep")  # type: ignore[untyped-decorator]
def _keep_shapes(x: Tensor, k: int, per_channel: bool, by_magnitude: bool) -> tuple[Tensor, Tensor]:
    count = x.shape[0] * (x.shape[1] if per_channel else 1)
    bits = x.new_empty((count, (x.numel() // count + 7) // 8), dtype=torch.uint8)
    return _laid_out(torch.empty_like(x), in_channels_last(x)), bits


@torch.library.register_fake("kwta_exp::pass_winners")  # type: ignore[untyped-decorator]
def _passed_shape(gradient: Tensor, bits: Tensor, channels_last: bool) -> Tensor:
    return torch.empty_like(_laid_out(gradient, channels_last))


@torch.library.register_fake("kwta_exp::kth_largest")  # type: ignore[untyped-decorator]
def _threshold_shape(rows: Tensor, k: int) -> Tensor:
    return rows.new_empty(rows.shape[0], 1)


def _save_bits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, per_channel, _ = inputs
    ctx.save_for_backward(output[1])
    ctx.channels_last = in_channels_last(x) and not per_channel


def _save_same(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.channels_last = inputs[2]


class _Keep(torch.autograd.Function):
    """The operator in eager mode, in 50 us less than with the formula below."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *how: Any) -> Tensor:
        output = below_autograd(_keep, x, *how)
        _save_bits(ctx, (x, *how), output)
        kept: Tensor = output[0]
        return kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _passed(ctx, gradient), None, None, None


class _Pass(torch.autograd.Function):
    """The gradient of the gradient is of the same form."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_same(ctx, inputs, inputs[0])
        passed: Tensor = below_autograd(_pass, *inputs)
        return passed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _passed(ctx, gradient), None, None


def _passed(ctx: Any, gradient: Tensor) -> Tensor:
    inputs = gradient, ctx.saved_tensors[0], ctx.channels_last
    passed: Tensor = _Pass.apply(*inputs) if torch.is_grad_enabled() else below_autograd(_pass, *inputs)
    return passed


# For torch.compile, which does not trace the functions above.
torch.library.register_autograd(
    "kwta_exp::keep",
    lambda ctx, gradient, _: (_pass(gradient, ctx.saved_tensors[0], ctx.channels_last), None, None, None),
    setup_context=_save_bits,
)
torch.library.register_autograd(
    "kwta_exp::pass_winners",
    lambda ctx, gradient: (_pass(gradient, ctx.saved_tensors[0], ctx.channels_last), None, None),
    setup_context=_save_same,
)
