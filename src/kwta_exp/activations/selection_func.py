"""k-WTA under ``torch.func``'s transforms and in forward mode, which an operator's own rules do not reach.

(Forward mode passes over a rule for autograd in silence: tangents would come out 0.)
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def under_transform() -> bool:
    """Whether ``torch.func`` or forward mode is at work: custom operators do not suit them."""
    return torch._C._are_functorch_transforms_active() or bool(forward_ad._current_level >= 0)


class Keep(torch.autograd.Function):
    """``keep``, in the plain memory format: what a transform wraps may lie otherwise than what it shows."""

    @staticmethod
    def forward(x: Tensor, k: int, per_channel: bool, by_magnitude: bool) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = torch.ops.kwta_exp.keep(x.contiguous(), k, per_channel, by_magnitude)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        return _Pass.apply(gradient, ctx.saved_tensors[0]), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
        return _Pass.apply(tangent, ctx.saved_tensors[0]), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, k: int, per_channel: bool, by_magnitude: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        folded = _fold(x, in_dims[0], info.batch_size)
        found = Keep.apply(folded, k, per_channel, by_magnitude)
        return tuple(each.unflatten(0, (info.batch_size, -1)) for each in found), (0, 0)


class _Pass(torch.autograd.Function):
    """``pass_winners`` for the same; linear in the gradient."""

    @staticmethod
    def forward(gradient: Tensor, bits: Tensor) -> Tensor:
        passed: Tensor = torch.ops.kwta_exp.pass_winners(gradient, bits, False)
        return passed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Pass.apply(gradient, ctx.saved_tensors[0]), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        passed: Tensor = _Pass.apply(tangent, ctx.saved_tensors[0])
        return passed

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], gradient: Tensor, bits: Tensor
    ) -> tuple[Tensor, int]:
        both = [_fold(each, dim, info.batch_size) for each, dim in zip((gradient, bits), in_dims, strict=True)]
        return _Pass.apply(*both).unflatten(0, (info.batch_size, -1)), 0


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """The dimension that is mapped over joined to the first."""
    batched = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return batched.flatten(0, 1)
