"""Stochastic LWTA against the probabilities that its noise must have."""

import math
from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from kwta_exp.activations import StochasticLWTA, stochastic_lwta

DRAWS = 40_000


def five_sigma(probability: float) -> float:
    """How far a share of :data:`DRAWS` may be from its probability: once in two million by chance."""
    return 5 * math.sqrt(probability * (1 - probability) / DRAWS)


@pytest.mark.parametrize(("first", "second"), [(0.3, 0.3), (1.0, -0.5), (-2.0, -1.0), (4.0, 1.0)])
def test_the_first_of_two_wins_with_the_sigmoid_of_their_difference(first: float, second: float) -> None:
    x = torch.tensor([first, second]).repeat(DRAWS, 1)
    gates = stochastic_lwta(x, 2, temperature=0.01) / x
    probability = 1 / (1 + math.exp(second - first))
    won = (gates[:, 0] > 0.5).double().mean().item()
    assert won == pytest.approx(probability, abs=five_sigma(probability))
    torch.testing.assert_close(gates.sum(1), torch.ones(DRAWS))
    near = ((gates < 1e-3) | (gates > 1 - 1e-3)).double().mean().item()
    assert near > 0.95  # the gates are near 0 and 1


@pytest.mark.parametrize("temperature", [0.01, 0.67])
def test_of_three_each_wins_with_its_softmax_probability_at_any_temperature(temperature: float) -> None:
    values = torch.tensor([0.5, 1.5, -0.5])
    gates = stochastic_lwta(values.repeat(DRAWS, 1), 3, temperature) / values
    shares = gates.argmax(1).bincount(minlength=3).double() / DRAWS
    for share, probability in zip(shares.tolist(), values.double().softmax(0).tolist(), strict=True):
        assert share == pytest.approx(probability, abs=five_sigma(probability))


def test_the_gates_at_temperature_067_have_the_exact_distribution() -> None:
    # The difference of two Gumbel variables is logistic, so P(gate < g) = sigmoid(T logit(g) - (x1 - x2)).
    first, second, temperature = 0.8, 0.2, 0.67
    x = torch.tensor([first, second]).repeat(DRAWS, 1)
    gates = stochastic_lwta(x, 2, temperature)[:, 0] / first
    for gate in (0.05, 0.2, 0.5, 0.8, 0.95):
        logistic = temperature * math.log(gate / (1 - gate)) - (first - second)
        probability = 1 / (1 + math.exp(-logistic))
        found = (gates < gate).double().mean().item()
        assert found == pytest.approx(probability, abs=five_sigma(probability))


def test_groups_are_neighbours_and_every_position_has_its_own_draw() -> None:
    x = torch.ones(1, 4, 30, 30)
    gates = stochastic_lwta(x, 2, temperature=0.01)
    torch.testing.assert_close(gates[:, 0] + gates[:, 1], torch.ones(1, 30, 30))
    torch.testing.assert_close(gates[:, 2] + gates[:, 3], torch.ones(1, 30, 30))
    first, third = gates[0, 0] > 0.5, gates[0, 2] > 0.5
    for drawn in (first, third, first == third):
        assert 0.4 < drawn.double().mean() < 0.6


def test_the_mode_decides_the_temperature_and_evaluation_is_random_too() -> None:
    x = torch.randn(20, 6, 5, 5)
    layer = StochasticLWTA(group_size=3, temperature=0.02, training_temperature=0.9)
    for mode, temperature in ((True, 0.9), (False, 0.02)):
        layer.train(mode)
        torch.manual_seed(1)
        found = layer(x)
        torch.manual_seed(1)
        assert torch.equal(found, stochastic_lwta(x, 3, temperature))  # the same seed, the same draws
        assert not torch.equal(found, layer(x))  # other draws at the next call


def test_gradients_are_those_of_the_softmax() -> None:
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def gated(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return stochastic_lwta(x, 2, temperature=0.67)

    assert torch.autograd.gradcheck(gated, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_shape_are_kept_and_half_precision_has_finite_noise(dtype: torch.dtype) -> None:
    x = torch.randn(50, 8, 20, 20).to(dtype)
    found = stochastic_lwta(x, 2)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    assert found.isfinite().all()
    assert stochastic_lwta(torch.zeros(0, 4, dtype=dtype), 2).shape == (0, 4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_it_compiles_without_a_break() -> None:
    torch.compiler.reset()
    network = nn.Sequential(nn.Conv2d(1, 4, 3), StochasticLWTA()).eval()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 1, 8, 8)
    torch.manual_seed(5)
    expected = network(x)
    torch.manual_seed(5)
    torch.testing.assert_close(compiled(x), expected)


def test_bad_settings_and_inputs_are_refused() -> None:
    for bad in ({"group_size": 0}, {"temperature": 0.0}, {"training_temperature": -1.0}, {"temperature": True}):
        with pytest.raises(ValidationError):
            StochasticLWTA(**bad)
    with pytest.raises(ValueError, match=r"expects \(N, C, ...\), got \(3,\)"):
        stochastic_lwta(torch.zeros(3))
    with pytest.raises(ValueError, match="group_size=2 does not divide the layer's 5 units"):
        stochastic_lwta(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"temperature=0\.0; expected a number above 0"):
        stochastic_lwta(torch.zeros(2, 4), temperature=0.0)
    assert repr(StochasticLWTA()) == "StochasticLWTA(group_size=2, temperature=0.01, training_temperature=0.67)"
    assert partial(StochasticLWTA, group_size=4)().group_size == 4
