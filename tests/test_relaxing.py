"""Operators relaxed in any code: exact forward, to the bit, and a gradient that leads somewhere."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwta_exp.activations import KWTA, LWTA, kwta
from kwta_exp.activations.soft_gate import soft_gate, standard_deviation
from kwta_exp.attacks.bpda import soft_lwta
from kwta_exp.attacks.relaxing import Relaxing
from kwta_exp.models import ResNet

K = 5
T = 0.2


def published(x: Tensor) -> Tensor:
    """As in the original repository: a threshold by topk, spread over the row, and a product."""
    flat = x.reshape(len(x), -1)
    threshold = flat.topk(K, dim=1)[0][:, -1]
    threshold = threshold.expand(flat.shape[1], len(x)).permute(1, 0)
    return ((flat >= threshold).to(flat) * flat).view_as(x)


def by_scatter(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    values, index = flat.topk(K, dim=1)
    return torch.zeros_like(flat).scatter_(1, index, values).view_as(x)


def by_mask_without_graph(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    with torch.no_grad():
        mask = torch.zeros_like(flat).scatter_(1, flat.topk(K, dim=1)[1], 1.0)
    return (mask * flat).view_as(x)


def by_assignment(x: Tensor) -> Tensor:
    flat = x.flatten(1).clone()
    threshold = flat.detach().kthvalue(flat.shape[1] - K + 1, dim=1, keepdim=True)[0]
    flat[flat.detach() < threshold] = 0
    return flat.view_as(x)


def by_where(x: Tensor) -> Tensor:
    threshold = x.flatten(1).sort(dim=1, descending=True)[0][:, K - 1].view(-1, 1, 1, 1)
    return torch.where(x >= threshold, x, 0.0)


def by_fill(x: Tensor) -> Tensor:
    threshold = x.flatten(1).topk(K, dim=1).values[:, -1:, None, None]
    return x.masked_fill(~(x >= threshold), 0.0)


def by_product_in_place(x: Tensor) -> Tensor:
    out = x.clone()
    out *= x >= x.flatten(1).topk(K, dim=1)[0].amin(1).view(-1, 1, 1, 1)
    return out


def by_sorted_index(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    index = flat.argsort(dim=1, descending=True)[:, :K]
    return (torch.zeros_like(flat).scatter(1, index, 1.0) * flat).view_as(x)


KWTA_FORMS = [
    published, by_scatter, by_mask_without_graph, by_assignment, by_where, by_fill, by_product_in_place,
    by_sorted_index,
]  # fmt: skip

OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "rounded": lambda x: (x * 7).round() / 7,
    "floored": lambda x: torch.floor(x * 4),
    "floor division": lambda x: (x // 0.5) * 0.5,
    "cast": lambda x: (x * 10).to(torch.int32).to(x) / 10,
    "sign": torch.sign,
    "heaviside": lambda x: torch.heaviside(x, torch.zeros((), dtype=x.dtype)),
    "clamped": lambda x: x.clamp(-0.2, 0.2),
    "band": lambda x: ((x > -0.5) & (x < 0.5)) * x,
    "either": lambda x: torch.where((x > 0.5) | (x < -0.5), x, 0.1),
    "nested": lambda x: ((x > 0).float() > 0.5).to(x) * x,
    "equal": lambda x: (x == x.amax(1, keepdim=True)).to(x) * x,
    "one-hot": lambda x: F.one_hot(x.argmax(1), x.shape[1]).permute(0, 3, 1, 2).to(x) * x,
    "taken": lambda x: x * x[x > 0].sum(),
    "counted": lambda x: x * (x > 0).sum(1, keepdim=True),
    "stacked": lambda x: torch.cat([x > 0, x < 0], 1).to(x),
    "thermometer": lambda x: (x[..., None] > torch.linspace(-1, 1, 5, dtype=x.dtype)).to(x).mean(-1),
    "buckets": lambda x: torch.bucketize(x, torch.linspace(-1, 1, 9, dtype=x.dtype)).to(x),
    "saturated softmax": lambda x: (x / 0.001).softmax(1) * x,
    "saturated sigmoid": lambda x: torch.sigmoid(1000 * x),
    "saturated tanh": lambda x: torch.tanh(1000 * x),
}


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 2, 3, generator=generator, dtype=torch.float64).to(dtype)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, mode: Relaxing | None) -> Tensor | None:
    """The gradient of a weighted sum of outputs; ``None`` if there is none."""
    x = x.clone().requires_grad_()
    if mode is None:
        out = function(x)
    else:
        with mode:
            out = function(x)
    if not out.requires_grad:
        return None
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    (found,) = torch.autograd.grad((out * weights).sum(), x)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "function", [*KWTA_FORMS, *OTHERS.values()], ids=[*(f.__name__ for f in KWTA_FORMS), *OTHERS]
)
def test_the_forward_pass_is_exact_to_the_bit(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = images(dtype)
    expected = function(x)
    with Relaxing(T):
        assert torch.equal(function(x), expected)
        found = function(x.clone().requires_grad_())
    assert torch.equal(found.detach(), expected)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("form", KWTA_FORMS, ids=lambda form: form.__name__)
def test_every_form_of_kwta_has_the_gradient_of_its_soft_gate(form: Callable[[Tensor], Tensor]) -> None:
    x = images()
    assert torch.equal(form(x), kwta(x, k=K))
    expected = gradient(lambda x: soft_gate(x, T, k=K), x, None)
    mode = Relaxing(T)
    found = gradient(form, x, mode)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert sum(mode.relaxed.values()) == 1
    assert not mode.lost


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_operator_passes_a_gradient_to_all_values(name: str) -> None:
    mode = Relaxing(T)
    found = gradient(OTHERS[name], images(), mode)
    assert found is not None
    assert found.isfinite().all()
    assert (found != 0).double().mean() > 0.9
    assert mode.relaxed


def test_the_gradient_of_a_comparison_is_that_of_its_sigmoid() -> None:
    x = images()
    soft = torch.sigmoid((x - 0.3) / (T * standard_deviation(x, [1, 2, 3])))
    expected = soft * (1 - soft) / (T * standard_deviation(x, [1, 2, 3]))
    weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)
    for function in (lambda x: (x > 0.3).double(), lambda x: 1 - (x <= 0.3).to(x), lambda x: (x > 0.3) * 1.0):
        torch.testing.assert_close(gradient(function, x, Relaxing(T)), expected * weights)


def test_rounding_passes_the_gradient_straight_through() -> None:
    x = images()
    weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)
    for name in ("rounded", "cast", "clamped"):
        torch.testing.assert_close(gradient(OTHERS[name], x, Relaxing(T)), weights)


LWTA_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "above the rival": lambda groups: groups >= groups.flip(2),
    "not below the largest": lambda groups: groups >= groups.amax(2, keepdim=True),
    "equal to the largest": lambda groups: groups == groups.max(2, keepdim=True).values,
    "at the index of the largest": lambda groups: torch.zeros_like(groups).scatter(
        2, groups.argmax(2, keepdim=True), 1.0
    ),
}


@pytest.mark.parametrize("form", LWTA_FORMS)
def test_every_form_of_lwta_is_near_its_soft_gate(form: str) -> None:
    def grouped(x: Tensor) -> Tensor:
        groups = x.unflatten(1, (-1, 2))
        return (groups * LWTA_FORMS[form](groups)).flatten(1, 2)

    x = images()
    assert torch.equal(grouped(x), LWTA()(x))
    mode = Relaxing(T)
    found, expected = gradient(grouped, x, mode), gradient(lambda x: soft_lwta(LWTA(), x, T), x, None)
    assert found is not None
    assert expected is not None
    cosine = F.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert cosine > 0.7
    assert sum(mode.relaxed.values()) == 1


def width(x: Tensor) -> Tensor:
    return T * standard_deviation(x, [1, 2, 3])


def gated(x: Tensor, at: Tensor) -> Tensor:
    return torch.sigmoid(x / width(at))


def among(x: Tensor, at: Tensor, k: int) -> Tensor:
    """Gates around the k-th largest value of ``at``, or what they have to move to for the same sum."""
    values = x.flatten(1)
    lowest, highest = values.amin(1, keepdim=True) - 1, values.amax(1, keepdim=True) + 1
    w = width(at).flatten(1)
    threshold = at.flatten(1).topk(k, dim=1).values[:, -1:]
    number = torch.sigmoid((at.flatten(1) - threshold) / w).sum(1, keepdim=True)
    for _ in range(60):
        threshold = (lowest + highest) / 2
        many = torch.sigmoid((values - threshold) / w).sum(1, keepdim=True) > number
        lowest, highest = torch.where(many, threshold, lowest), torch.where(many, highest, threshold)
    return torch.sigmoid((values - threshold) / w).view_as(x)


def scaled(x: Tensor, size: Tensor) -> Tensor:
    """Back to a spread of 0.1 / T, as saturated squashings are."""
    return x * (0.1 / T / size).clamp_max(1.0)


def root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean((1, 2, 3), keepdim=True).sqrt()


SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "greater": (lambda x: (x > 0.3).to(x), lambda x, at: gated(x - 0.3, at)),
    "less": (lambda x: (torch.full_like(x, 0.3) < x).to(x), lambda x, at: gated(x - 0.3, at)),
    "less or equal": (lambda x: (x <= 0.3).to(x), lambda x, at: gated(0.3 - x, at)),
    "two operands": (lambda x: (x > x.flip(1)).to(x), lambda x, at: gated(x - x.flip(1), at)),
    "above the mean": (
        lambda x: (x > x.mean((1, 2, 3), keepdim=True)).to(x),
        lambda x, at: gated(x - x.mean((1, 2, 3), keepdim=True), at),
    ),
    "equal": (lambda x: (x == x.flip(1)).to(x), lambda x, at: torch.exp(-(x - x.flip(1)).abs() / width(at))),
    "not equal": (lambda x: (x != 0.3).to(x), lambda x, at: 1 - torch.exp(-(x - 0.3).abs() / width(at))),
    "the largest": (lambda x: (x == x.amax((1, 2, 3), keepdim=True)).to(x), lambda x, at: among(x, at, 1)),
    "not below the k-th": (
        lambda x: (x >= x.flatten(1).topk(K, 1)[0].amin(1)[:, None, None, None]).to(x),
        lambda x, at: among(x, at, K),
    ),
    "at the k largest": (
        lambda x: torch.zeros_like(x.flatten(1)).scatter(1, x.flatten(1).topk(K, 1)[1], 1.0).view_as(x),
        lambda x, at: among(x, at, K),
    ),
    "sign": (torch.sign, lambda x, at: 2 * gated(x, at) - 1),
    "heaviside": (OTHERS["heaviside"], gated),
    "both": (
        lambda x: ((x > -0.5) & (x < 0.5)).to(x),
        lambda x, at: gated(x + 0.5, at) * gated(0.5 - x, at),
    ),
    "rounding": (torch.round, lambda x, at: x),
    "clamp": (OTHERS["clamped"], lambda x, at: x),
    "floor division": (lambda x: x // 0.5, lambda x, at: x / 0.5),
    "saturated softmax": (
        lambda x: (x / 0.001).softmax(1),
        lambda x, at: scaled(x / 0.001, standard_deviation(at / 0.001, [1, 2, 3])).softmax(1),
    ),
    "saturated sigmoid": (
        OTHERS["saturated sigmoid"],
        lambda x, at: torch.sigmoid(scaled(1000 * x, root_mean_square(1000 * at))),
    ),
    "saturated tanh": (
        OTHERS["saturated tanh"],
        lambda x, at: torch.tanh(scaled(1000 * x, root_mean_square(1000 * at))),
    ),
}
"""Operators, and their smooth forms near ``at``, where spreads are measured."""


@pytest.mark.parametrize("name", SMOOTH)
def test_the_gradient_is_a_finite_difference_of_the_smooth_form(name: str) -> None:
    operator, smooth = SMOOTH[name]
    x = images()
    found = gradient(operator, x, Relaxing(T))
    assert found is not None
    weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)
    generator = torch.Generator().manual_seed(1)
    h = 1e-6
    for _ in range(3):
        direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        ahead, behind = smooth(x + h * direction, x), smooth(x - h * direction, x)
        expected = ((ahead - behind) * weights).sum((1, 2, 3)) / (2 * h)
        torch.testing.assert_close((found * direction).sum((1, 2, 3)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh], ids=lambda kind: kind.__name__)
def test_where_nothing_blocks_the_gradient_it_is_the_same_to_the_bit(
    activation: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    network = ResNet(activation=activation, num_classes=10, in_channels=3, depth=18, width=4).eval()
    x = torch.rand(4, 3, 16, 16)
    mode = Relaxing(0.01)
    assert torch.equal(gradient(network, x, mode), gradient(network, x, None))  # type: ignore[arg-type]
    assert not mode.relaxed
    assert not mode.lost


def test_an_unsaturated_softmax_keeps_its_gradient() -> None:
    x = images()
    mode = Relaxing(0.1)
    assert torch.equal(
        gradient(lambda x: (0.1 * x).softmax(1), x, mode),  # type: ignore[arg-type]
        gradient(lambda x: (0.1 * x).softmax(1), x, None),  # type: ignore[arg-type]
    )
    assert not mode.relaxed


def test_a_straight_through_estimator_of_the_network_is_left_as_it_is() -> None:
    def estimated(x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()

    x = images()
    torch.testing.assert_close(gradient(estimated, x, Relaxing(T)), gradient(estimated, x, None))


def test_values_given_away_to_numpy_are_counted() -> None:
    def away(x: Tensor) -> Tensor:
        return x * torch.from_numpy((x.detach().numpy() > 0).astype("float64"))

    mode = Relaxing(T)
    gradient(away, images(), mode)
    assert mode.lost == {"numpy": 1}


def test_without_an_exact_forward_pass_the_stand_ins_are_computed() -> None:
    x = images()
    with Relaxing(T, exact_forward=False):
        found = published(x.clone().requires_grad_())
    torch.testing.assert_close(found.detach(), soft_gate(x, T, k=K))


def test_networks_are_left_as_they_were() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), KWTA(k=3))
    before = {name: value.clone() for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    gradient(partial(network), images(torch.float32), Relaxing(T))
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in network.parameters())
