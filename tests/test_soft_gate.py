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
    """With its gradient, and the gradient of that; on the CPU the formula itself runs otherwise."""
    x = torch.randn(3, 4, 5, 2).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(3, 4, 5, 2)
    results = []
    for gated in (
        soft_gate(x, 0.3, k=3, over=over, by=by),
        _SoftGate.apply(x, 3, over == "channel", by == "magnitude", 0.3),
    ):
        (once,) = torch.autograd.grad(gated, x, weight, retain_graph=True)
        (differentiable,) = torch.autograd.grad(gated, x, weight, create_graph=True)
        (twice,) = torch.autograd.grad(differentiable, x, weight)
        assert gated.stride() == x.stride()
        results.append((gated, once, differentiable, twice))
    for formula, operator in zip(*results, strict=True):
        torch.testing.assert_close(operator, formula, rtol=1e-4, atol=1e-5)


def test_a_nan_closes_the_gate_of_finite_values() -> None:
    x = torch.randn(2, 12)
    x[0, :4] = float("nan")
    gated = _SoftGate.apply(x, 3, False, False, 0.3)
    assert torch.equal(gated.isnan(), soft_gate(x, 0.3, k=3).isnan())


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


def as_before(x: Tensor, k: int, temperature: float) -> Tensor:
    """The relaxation as operators of torch, written out."""
    rows = x.detach().flatten(1)
    threshold = rows.sort(descending=True).values[:, k - 1, None, None, None]
    from_mean = x.detach() - x.detach().mean((1, 2, 3), keepdim=True)
    norm = torch.linalg.vector_norm(from_mean, dim=(1, 2, 3), keepdim=True)
    std = (norm / (rows.shape[1] - 1) ** 0.5).clamp_min(1e-12)
    return x * torch.sigmoid((x - threshold) / (temperature * std))


def test_on_a_cpu_not_one_bit_differs_from_the_formula() -> None:
    x = torch.randn(3, 4, 5, 2, requires_grad=True)
    found, expected = soft_gate(x, 0.1, k=9), as_before(x, 9, 0.1)
    assert torch.equal(found, expected)
    for one, other in zip(*(torch.autograd.grad(each.sum(), x) for each in (found, expected)), strict=True):
        assert torch.equal(one, other)
