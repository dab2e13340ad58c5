"""The soft gate's operators, and how operators are called in eager mode: what modes, autograd and torch see."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kwta_exp import randomness
from kwta_exp.activations import kwta
from kwta_exp.activations.selection import keep
from kwta_exp.activations.soft_gate import _SoftGate, soft_gate


class Seen(TorchDispatchMode):
    """The names of the operators of this project that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "kwta_exp":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("over", ["volume", "channel"])
@pytest.mark.parametrize("by", ["value", "magnitude"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_operator_is_the_formula(over: Any, by: Any, layout: torch.memory_format) -> None:
    """With its gradient, and the gradient of that; in float64 the formula itself runs."""
    generator = torch.Generator().manual_seed(0)
    data, weights = torch.randn(2, 3, 4, 5, 2, generator=generator)
    results = []
    for dtype, names in ((torch.float64, []), (torch.float32, ["soft_gate"])):
        x = data.to(dtype).contiguous(memory_format=layout).requires_grad_()
        weight = weights.to(dtype)
        with Seen() as seen:
            gated = soft_gate(x, 0.3, k=3, over=over, by=by)
        assert [name for name in seen.names if name == "soft_gate"] == names
        (once,) = torch.autograd.grad(gated, x, weight, retain_graph=True)
        (differentiable,) = torch.autograd.grad(gated, x, weight, create_graph=True)
        (twice,) = torch.autograd.grad(differentiable, x, weight)
        assert gated.stride() == x.stride()
        results.append((gated, once, differentiable, twice))
    for formula, operator in zip(*results, strict=True):
        torch.testing.assert_close(operator.double(), formula, rtol=1e-4, atol=1e-5)


def test_a_nan_closes_the_gate_of_finite_values() -> None:
    x = torch.randn(2, 12)
    x[0, :4] = float("nan")
    gated = _SoftGate.apply(x, 3, False, False, 0.3)
    assert torch.equal(gated.isnan(), soft_gate(x.double(), 0.3, k=3).isnan())


def test_dispatch_modes_see_the_operators() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with Seen() as seen:
        kept = kwta(x, 0.2)
        torch.autograd.grad(kept.sum(), x, create_graph=True)
        kwta(x.detach(), 0.2)
        _SoftGate.apply(x, 3, False, False, 0.3).sum().backward()
        randomness.uniform(torch.arange(3), (2, 2))
    assert seen.names == ["keep", "pass_winners", "keep", "soft_gate", "pass_soft_gate", "uniform"]


def test_the_gradient_of_winners_is_differentiable_in_what_came_in() -> None:
    x, g = torch.randn(2, 20, requires_grad=True), torch.randn(2, 20, requires_grad=True)
    (passed,) = torch.autograd.grad(keep(x, 3, False, False), x, g, create_graph=True)
    (twice,) = torch.autograd.grad(passed.pow(2).sum(), g, create_graph=True)
    assert torch.equal(twice, 2 * passed)
    (thrice,) = torch.autograd.grad(twice.sum(), g)
    assert torch.equal(thrice, 2 * (passed != 0))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of its check
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("keep", lambda x, g: (x, 5, False, True)),
        ("pass_winners", lambda x, g: (g, torch.full((2, 12), 85, dtype=torch.uint8), True)),
        ("kth_largest", lambda x, g: (x.detach().flatten(1), 3)),
        ("soft_gate", lambda x, g: (x.detach(), 5, True, True, 0.1)),
        ("pass_soft_gate", lambda x, g: (g.detach(), x.detach(), torch.ones(2, 1), torch.ones(2, 1), True)),
        ("uniform", lambda x, g: (torch.arange(3), 7)),
    ],
)
def test_torch_accepts_the_operators(name: str, make: Any) -> None:
    """Schema, shapes without data, and tracing, as torch checks them."""
    x, g = (torch.randn(2, 6, 4, 4).contiguous(memory_format=torch.channels_last) for _ in range(2))
    torch.library.opcheck(
        getattr(torch.ops.kwta_exp, name).default, make(x.requires_grad_(), g.requires_grad_())
    )


def soft_winners(score: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
    return torch.sigmoid((score - threshold) / width).sum(1, keepdim=True)


def with_as_many_winners(score: Tensor, threshold: Tensor, width: Tensor, number: Tensor) -> Tensor:
    """The threshold for which the soft gates of ``score`` add up to ``number``, by bisection."""
    low, high = threshold - 1, threshold + 1
    for _ in range(60):
        middle = (low + high) / 2
        many = soft_winners(score, middle, width) > number
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    return (low + high) / 2


@pytest.mark.parametrize("by", ["value", "magnitude"])
def test_the_gradient_is_that_of_gates_whose_number_of_winners_stays(by: Any) -> None:
    """Central differences of the smooth function: the threshold moves so that the gates add up to the same."""
    generator = torch.Generator().manual_seed(0)
    x, weight, direction = torch.randn(3, 6, 24, generator=generator, dtype=torch.float64)
    score = x.abs() if by == "magnitude" else x
    threshold = score.sort(1, descending=True).values[:, 4:5]
    width = 0.3 * score.std(1, keepdim=True)
    number = soft_winners(score, threshold, width)

    def smooth(x: Tensor) -> Tensor:
        score = x.abs() if by == "magnitude" else x
        moved = with_as_many_winners(score, threshold, width, number)
        return (weight * x * torch.sigmoid((score - moved) / width)).sum(1)

    h = 1e-6
    expected = (smooth(x + h * direction) - smooth(x - h * direction)) / (2 * h)
    x.requires_grad_()
    for gated in (soft_gate(x, 0.3, k=5, by=by), soft_gate(x.float(), 0.3, k=5, by=by)):
        (gradient,) = torch.autograd.grad(gated, x, weight.to(gated.dtype))
        tolerance = 1e-6 if gated.dtype == torch.float64 else 1e-4
        torch.testing.assert_close((gradient * direction).sum(1), expected, rtol=tolerance, atol=tolerance)
