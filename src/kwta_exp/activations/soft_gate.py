"""A smooth stand-in for k-WTA: each value times a sigmoid around the threshold, instead of 0 or 1.

One operator computes the threshold, the standard deviation and the gated values, and another one the gradient;
on a CUDA device each is a Triton kernel. In float64, under ``torch.func``, in forward mode and under
``torch.compile``, the formula runs as PyTorch's own operators.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kwta_exp.activations.kwta import By, Over, _winners, kwta_threshold
from kwta_exp.activations.layout import _laid_out, _on_its_own_layout, _rows, in_channels_last
from kwta_exp.activations.selection import _implements, below_autograd, kth_largest, under_transform

TINY = 1e-30

torch.library.define(
    "kwta_exp::soft_gate",
    "(Tensor x, int k, bool per_channel, bool by_magnitude, float temperature) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "kwta_exp::pass_soft_gate",
    "(Tensor gradient, Tensor x, Tensor thresholds, Tensor widths, bool by_magnitude) -> Tensor",
)


def soft_gate(
    x: Tensor,
    temperature: float,
    ratio: float | None = None,
    *,
    k: int | None = None,
    over: Over = "volume",
    by: By = "value",
) -> Tensor:
    """``x * sigmoid((s - t) / (temperature * std(s)))``: s the score, t the k-th largest of it.

    The score is ``x`` or its magnitude. The threshold moves with the scores of its row
    (:func:`moving_threshold`), so a value that rises pushes others out. The standard deviation, one for each
    row of competitors, counts as a constant of the gradient.

    Args:
        x: floating point ``(N, ...)`` of 2 to 5 dimensions, in any memory format.
        temperature: the width of the gate, as a multiple of the standard deviation.
        ratio: as for :func:`~kwta_exp.activations.kwta`, like the other arguments.
        k: instead of a ratio.
        over: which values compete.
        by: what s is.

    Returns:
        A tensor like ``x``.
    """
    per_channel = over == "channel" and x.dim() > 2
    if x.dtype != torch.float64 and x.numel() and not _traced():
        count, by_magnitude = _winners(x, ratio, k, per_channel), by == "magnitude"
        gated: Tensor
        if torch.is_grad_enabled() and x.requires_grad:
            gated = _SoftGate.apply(x, count, per_channel, by_magnitude, temperature)
        else:
            gated = below_autograd(_gate, x, count, per_channel, by_magnitude, temperature)[0]
        return gated
    threshold = kwta_threshold(x.detach(), ratio, k=k, over=over, by=by)
    dims = range(1 + per_channel, x.dim())
    width = temperature * standard_deviation(x.abs() if by == "magnitude" else x, dims)
    return _formula(x, threshold, width, by == "magnitude")


def _formula(x: Tensor, threshold: Tensor, width: Tensor, by_magnitude: bool) -> Tensor:
    """The gated values by PyTorch's own operators, for thresholds and widths that broadcast with ``x``."""
    score = x.abs() if by_magnitude else x
    dims = range(1 if threshold.shape[1] == 1 else 2, x.dim())
    return x * torch.sigmoid((score - moving_threshold(score, threshold, width, dims)) / width)


def moving_threshold(score: Tensor, threshold: Tensor, width: Tensor, dims: Sequence[int]) -> Tensor:
    """The ``threshold`` of a soft gate, with the gradient of one that keeps the number of winners.

    While the scores s change, the threshold t keeps the sum of ``sigmoid((s - t) / w)`` as it is; by the
    implicit function theorem, ``dt / ds_i = sigmoid'((s_i - t) / w) / sum_j sigmoid'((s_j - t) / w)``. The k-th
    largest score itself has a gradient of 1 by one score and 0 by all others.

    Args:
        score: what competes.
        threshold: one for each row of competitors; it broadcasts with ``score``.
        width: of the gate, likewise.
        dims: over which they compete.
    """
    values = score.detach()
    is_open = torch.sigmoid((values - threshold.detach()) / width)
    share = is_open * (1 - is_open)
    share = share / share.sum(tuple(dims), keepdim=True).clamp_min(TINY)
    return threshold.detach() + (share * (score - values)).sum(tuple(dims), keepdim=True)


def standard_deviation(x: Tensor, dims: Sequence[int]) -> Tensor:
    """The standard deviation over ``dims``, which are kept, above 0 and without a graph.

    In two passes, because ``torch.std`` is several times slower on a CPU.
    """
    x, over = x.detach(), tuple(dims)
    from_mean = x - x.mean(over, keepdim=True)
    freedom = max(1, math.prod(x.shape[dim] for dim in over) - 1)
    std: Tensor = torch.linalg.vector_norm(from_mean, dim=over, keepdim=True) / freedom**0.5
    return std.clamp_min(1e-12)


def _traced() -> bool:
    return torch.compiler.is_compiling() or under_transform()


_gate = torch.ops.kwta_exp.soft_gate.default
_pass = torch.ops.kwta_exp.pass_soft_gate.default


class _SoftGate(torch.autograd.Function):
    """The operator, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, k: int, per_channel: bool, by_magnitude: bool, temperature: float
    ) -> Tensor:
        gated: Tensor
        gated, thresholds, widths = below_autograd(_gate, x, k, per_channel, by_magnitude, temperature)
        ctx.save_for_backward(x, thresholds, widths)
        ctx.by_magnitude = by_magnitude
        return gated

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, thresholds, widths = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate the gradient
            lead = x.shape[: 1 if len(thresholds) == len(x) else 2]
            shape = *lead, *[1] * (x.dim() - len(lead))
            gated = _formula(x, thresholds.view(shape), widths.view(shape), ctx.by_magnitude).to(x.dtype)
            (passed,) = torch.autograd.grad(gated, x, gradient, create_graph=True)
        else:
            passed = below_autograd(_pass, gradient, x, thresholds, widths, ctx.by_magnitude)
        return passed, None, None, None, None


@_implements("kwta_exp::soft_gate", "CPU")
def _gate_on_cpu(
    x: Tensor, k: int, per_channel: bool, by_magnitude: bool, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    dense, _ = _on_its_own_layout(x.detach(), per_channel)
    rows = _rows(dense, per_channel=per_channel).float()
    score = rows.abs() if by_magnitude else rows
    threshold = kth_largest(score, k)
    threshold = threshold.masked_fill(threshold.isnan(), math.inf)
    width = temperature * standard_deviation(score, range(1, score.dim()))
    gated = (score - threshold).div_(width).sigmoid_().mul_(rows).to(x.dtype)
    return _laid_out(gated.as_strided(dense.shape, dense.stride()), in_channels_last(x)), threshold, width


@_implements("kwta_exp::soft_gate", "CUDA")
def _gate_on_cuda(
    x: Tensor, k: int, per_channel: bool, by_magnitude: bool, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    from kwta_exp.activations import selection_triton

    dense, _ = _on_its_own_layout(x.detach(), per_channel)
    rows = _rows(dense, per_channel=per_channel)
    gated, thresholds, widths = selection_triton.gate(rows, k, by_magnitude, temperature)
    return _laid_out(gated.as_strided(dense.shape, dense.stride()), in_channels_last(x)), thresholds, widths


def _pass_rows(
    gradients: Tensor, rows: Tensor, thresholds: Tensor, widths: Tensor, by_magnitude: bool
) -> Tensor:
    """The gradient by ``rows`` ``(N, M)``: ``g * o + (g * x - m) * o' / w`` with ``o = sigmoid((s - t) / w)``.

    Here m is the mean of ``g * x`` weighted by ``o'``: the threshold moves. In place, to save memory traffic.
    """
    is_open = ((rows.abs() if by_magnitude else rows) - thresholds).div_(widths).sigmoid_()
    share = torch.addcmul(is_open, is_open, is_open, value=-1)
    moves = gradients * rows
    mean = torch.linalg.vecdot(moves, share)[:, None] / share.sum(1, keepdim=True).clamp_min_(TINY)
    moves.sub_(mean).mul_(share.div_(widths))
    return (moves.mul_(rows.sign()) if by_magnitude else moves).addcmul_(gradients, is_open)


@_implements("kwta_exp::pass_soft_gate", "CPU")
def _pass_gate_on_cpu(
    gradient: Tensor, x: Tensor, thresholds: Tensor, widths: Tensor, by_magnitude: bool
) -> Tensor:
    return _pass_by(_pass_rows, gradient, x, thresholds, widths, by_magnitude)


@_implements("kwta_exp::pass_soft_gate", "CUDA")
def _pass_gate_on_cuda(
    gradient: Tensor, x: Tensor, thresholds: Tensor, widths: Tensor, by_magnitude: bool
) -> Tensor:
    from kwta_exp.activations import selection_triton

    return _pass_by(selection_triton.pass_gate, gradient, x, thresholds, widths, by_magnitude)


def _pass_by(
    of_rows: Callable[..., Tensor], gradient: Tensor, x: Tensor, thresholds: Tensor, widths: Tensor,
    by_magnitude: bool,
) -> Tensor:  # fmt: skip
    """The gradient, in the layout of ``x``, by a function of rows."""
    dense, channels_last = _on_its_own_layout(x.detach(), per_channel=len(thresholds) != len(x))
    gradient = _laid_out(gradient.detach(), channels_last)
    rows, gradients = (_rows(each, thresholds) for each in (dense, gradient))
    if x.device.type == "cpu":
        rows, gradients = rows.float(), gradients.float()
    passed = of_rows(gradients, rows, thresholds, widths, by_magnitude).to(x.dtype)
    return _laid_out(passed.as_strided(gradient.shape, gradient.stride()), in_channels_last(x))


@torch.library.register_fake("kwta_exp::soft_gate")  # type: ignore[untyped-decorator]
def _gate_shapes(
    x: Tensor, k: int, per_channel: bool, by_magnitude: bool, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    count = x.shape[0] * (x.shape[1] if per_channel else 1)
    thresholds, widths = (x.new_empty((count, 1), dtype=torch.float32) for _ in range(2))
    return _laid_out(torch.empty_like(x), in_channels_last(x)), thresholds, widths


@torch.library.register_fake("kwta_exp::pass_soft_gate")  # type: ignore[untyped-decorator]
def _passed_shape(
    gradient: Tensor, x: Tensor, thresholds: Tensor, widths: Tensor, by_magnitude: bool
) -> Tensor:
    return torch.empty_like(_laid_out(x, in_channels_last(x)))
