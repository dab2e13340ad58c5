"""BPDA on code that it has never seen: what it relaxes, what it smooths, and what it says it cannot cover."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kwta_exp.activations import KWTA
from kwta_exp.attacks import BPDA, PGD, NotApplicableError, RelaxedTransfer
from kwta_exp.attacks.bpda import relaxable
from kwta_exp.attacks.relaxing.model import Found, RelaxedModel, examined
from kwta_exp.attacks.relaxing.opaque import gradient_agrees, secant
from kwta_exp.models import CNN, MLP, ResNet
from kwta_exp.randomness import fold

SIZE: dict[str, Any] = {"channels": [8, 8, 16, 16], "hidden": 32}
FACTS: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "image_size": (8, 8)}


class PublishedKWTA(nn.Module):
    """k-WTA in the operators of published code."""

    def forward(self, x: Tensor) -> Tensor:
        k = max(1, int(0.1 * x[0].numel()))
        flat = x.reshape(x.shape[0], -1)
        threshold = flat.topk(k, dim=1).values[:, -1:]
        mask = (flat >= threshold).to(x.dtype)
        return (flat * mask).view_as(x)


class NumpyRounding(nn.Module):
    """A detour through NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.round(x.detach().numpy() * 8) / 8).to(x)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return torch.zeros_like(gradient)


class FunctionRounding(nn.Module):
    """A custom autograd function that rounds and hides its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = _Rounded.apply(x)
        return rounded


class _Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class FunctionCube(nn.Module):
    """A custom autograd function with an honest gradient."""

    def forward(self, x: Tensor) -> Tensor:
        cubed: Tensor = _Cubed.apply(x)
        return cubed


class Detached(nn.Module):
    """A squaring that is cut off from the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach() ** 2


class NumpyPooling(nn.Module):
    """A detour through NumPy to another shape."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.round(x.detach().numpy()[..., ::2] * 8) / 8).to(x)


def behind(part: nn.Module, features: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(part, nn.Flatten(), nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


def traced(part: nn.Module, example: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop its tracer, and people have traced networks
        made: nn.Module = torch.jit.trace(part, example)
    return made


def found_in(model: nn.Module, x: Tensor) -> Found:
    return examined(model, relaxable(model, None), x)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_relu_network_holds_nothing_to_relax(x: Tensor) -> None:
    model = CNN(nn.ReLU, **SIZE, **FACTS).eval()
    assert found_in(model, x) == Found()
    for attack in (BPDA(norm="linf", eps=0.1), RelaxedTransfer(norm="linf", eps=0.1)):
        with pytest.raises(NotApplicableError, match="none of its operators blocks a gradient"):
            attack(model, x, model(x).argmax(1), torch.arange(4))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU])
def test_on_smooth_networks_the_steps_are_those_of_plain_pgd(
    activation: Callable[[], nn.Module], x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BPDA, "require_relaxed", lambda *_: None)
    model = CNN(activation, **SIZE, **FACTS).eval().requires_grad_(False)
    y, keys = model(x).argmax(1), torch.arange(4)
    effort: Any = {"norm": "linf", "eps": 0.1, "steps": 5, "loss": "ce"}
    relaxed = BPDA(**effort, ascent="pgd", restarts=1)(model, x, y, keys)
    assert torch.equal(relaxed, PGD(**effort)(model, x, y, fold(0, keys)))


def test_networks_of_this_projects_layers_are_attacked_as_without_operators(x: Tensor) -> None:
    model = CNN(partial(KWTA, ratio=0.2), **SIZE, **FACTS).eval().requires_grad_(False)
    y, keys = model(x).argmax(1), torch.arange(4)
    effort: Any = {"norm": "linf", "eps": 0.1, "steps": 6, "restarts": 2}
    with_operators, without = (BPDA(**effort, operators=on)(model, x, y, keys) for on in (True, False))
    assert torch.equal(with_operators, without)
    assert found_in(model, x) == Found(layers=5)


def test_published_lines_of_kwta_fall_as_far_as_the_layer() -> None:
    """Random networks in float64: the operators' gradient is that of the layer's own relaxation."""
    left = {}
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    for name, activation in (("layer", partial(KWTA, ratio=0.1)), ("lines", PublishedKWTA)):
        torch.manual_seed(0)
        model = MLP(activation, hidden=[200, 200], **FACTS).double().eval().requires_grad_(False)
        y = model(images).argmax(1)
        attack = BPDA(norm="linf", eps=0.03, steps=20, restarts=2)
        x_adv = attack(model, images, y, torch.arange(60))
        left[name] = (model(x_adv).argmax(1) == y).double().mean().item()
    plain = PGD(norm="linf", eps=0.03, steps=20, restarts=2)(model, images, y, torch.arange(60))
    print(left, "plain PGD", (model(plain).argmax(1) == y).double().mean().item())
    assert abs(left["layer"] - left["lines"]) <= 0.02
    assert left["lines"] < (model(plain).argmax(1) == y).double().mean().item() - 0.1


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (NumpyRounding(), "values leave torch"),
        (FunctionRounding(), "autograd.Function _Rounded"),
        (Detached(), "no gradient"),
    ],
)
def test_a_part_that_hides_its_gradient_is_smoothed_and_named(part: nn.Module, why: str, x: Tensor) -> None:
    model = behind(part).requires_grad_(False)
    found = found_in(model, x)
    assert list(found.smoothed) == ["0"]
    assert why in found.smoothed["0"]
    assert not found.not_covered

    y = model(x).argmax(1)
    plain = PGD(norm="linf", eps=0.3, steps=20)(model, x, y, torch.arange(4))
    x_adv = BPDA(norm="linf", eps=0.3, steps=20, restarts=1)(model, x, y, torch.arange(4))
    assert (model(plain).argmax(1) == y).all()
    assert not (model(x_adv).argmax(1) == y).any()


def test_a_part_of_another_shape_is_named_as_not_covered(x: Tensor) -> None:
    found = found_in(behind(NumpyPooling(), features=32), x)
    assert list(found.not_covered) == ["0"]
    assert not found.smoothed
    assert found.hard == 0


def test_a_detour_outside_any_part_is_the_networks_own(x: Tensor) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = behind(nn.Identity())

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(torch.from_numpy(np.round(x.detach().numpy() * 8) / 8))
            return logits

    assert list(found_in(Whole().eval(), x).not_covered) == ["the network"]


def test_an_honest_custom_function_is_cleared(x: Tensor) -> None:
    model = behind(FunctionCube())
    assert found_in(model, x) == Found()


def test_compiled_code_is_cleared_if_its_gradient_is_honest_and_smoothed_if_not(x: Tensor) -> None:
    with_relu = behind(nn.Identity())
    with_relu[3] = traced(nn.ReLU(), torch.rand(2, 32))
    assert found_in(with_relu, x) == Found()
    with_steps = behind(nn.Identity())
    with_steps[3] = traced(Steps(), torch.rand(2, 32))
    found = found_in(with_steps, x)
    assert list(found.smoothed) == ["3"]
    assert "compiled" in found.smoothed["3"]
    model = with_steps.requires_grad_(False)
    y = model(x).argmax(1)
    x_adv = BPDA(norm="linf", eps=0.5, steps=20, restarts=1)(model, x, y, torch.arange(4))
    assert (model(x_adv).argmax(1) != y).any()


class Steps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 4).round() / 4


def test_operators_are_counted_for_one_pass(x: Tensor) -> None:
    torch.manual_seed(0)
    model = MLP(PublishedKWTA, hidden=[50, 50], **FACTS).eval()
    details = BPDA(norm="linf", eps=0.1).details(model, x)
    assert details == {
        "activations_replaced": 0, "operators_relaxed": {"comparison": 2}, "smoothed": {}, "not_covered": {},
    }  # fmt: skip


def test_outputs_stay_the_networks_own(x: Tensor) -> None:
    for part in (NumpyRounding(), FunctionRounding(), Steps(), PublishedKWTA()):
        model = behind(part).requires_grad_(False)
        relaxing = RelaxedModel(model, relaxable(model, None), operators=True)
        for _ in range(2):
            assert torch.equal(relaxing(x.clone().requires_grad_()), model(x))
        assert "forward" not in vars(part)
        assert not part._forward_hooks


def test_a_secant_is_the_slope_of_a_function_of_single_values() -> None:
    x = torch.randn(3, 50, dtype=torch.float64)
    torch.testing.assert_close(secant(nn.Identity(), x), torch.ones_like(x))
    slope = secant(Steps(), x)
    assert 0.8 < slope.mean() < 1.2
    assert slope.std() < 0.6


@pytest.mark.parametrize(
    "part", [nn.ReLU(), nn.Softmax(1), nn.Linear(50, 20), nn.BatchNorm1d(50).eval(), FunctionCube()]
)
def test_the_gradient_of_smooth_parts_agrees(part: nn.Module) -> None:
    assert gradient_agrees(part, torch.randn(4, 50, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("part", [Steps(), PublishedKWTA(), FunctionRounding(), NumpyRounding(), Detached()])
def test_the_gradient_of_parts_that_jump_or_hide_does_not_agree(part: nn.Module) -> None:
    assert not gradient_agrees(part, torch.randn(4, 50, generator=torch.Generator().manual_seed(0)))


def bytes_kept(network: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """The memory that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x.clone().requires_grad_())
    return sum(kept.values())


@pytest.mark.parametrize(
    ("activation", "most"), [(nn.ReLU, 1.0), (PublishedKWTA, 1.3), (partial(KWTA, ratio=0.1), 1.4)]
)
def test_relaxing_keeps_little_more_memory(activation: Callable[[], nn.Module], most: float) -> None:
    torch.manual_seed(0)
    network = ResNet(activation=activation, num_classes=10, in_channels=3, depth=18, width=8)
    network = network.eval().requires_grad_(False)
    relaxing = RelaxedModel(network, relaxable(network, None), True, True)
    x = torch.rand(8, 3, 16, 16)
    assert bytes_kept(relaxing, x) <= most * bytes_kept(network, x)
