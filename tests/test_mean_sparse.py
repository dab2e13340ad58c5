"""MeanSparse against its definition: the band around the mean, the running statistics, saving and loading."""

import copy
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from kwta_exp.activations import MeanSparse, mean_sparse
from kwta_exp.checkpoint import load_into, read_weights, require_fit, save_weights, weights_of
from kwta_exp.errors import UserError


def test_values_near_the_mean_of_their_channel_become_that_mean() -> None:
    x = torch.tensor([[1.0, 10.0], [1.4, 10.4], [0.49, 9.0], [1.5, math.nan]])
    found = mean_sparse(x, torch.tensor([1.0, 10.0]), torch.tensor([1.0, 4.0]), alpha=0.5)
    expected = torch.tensor([[1.0, 10.0], [1.0, 10.0], [0.49, 10.0], [1.0, math.nan]])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(60, 3), (60, 3, 5), (6, 3, 4, 5)])
def test_every_shape_has_one_band_for_each_channel(shape: tuple[int, ...]) -> None:
    x, mean, variance = torch.randn(shape), torch.tensor([0.3, -0.2, 0.0]), torch.tensor([0.1, 1.0, 4.0])
    found = mean_sparse(x, mean, variance, alpha=0.7)
    for channel in range(3):
        values, centre = x[:, channel], mean[channel]
        inside = (values - centre).abs() <= 0.7 * variance[channel].sqrt()
        assert inside.any()
        assert not inside.all()
        assert (found[:, channel][inside] == centre).all()
        assert torch.equal(found[:, channel][~inside], values[~inside])


def test_in_training_it_is_a_relu_that_collects_statistics_as_batch_norm_does() -> None:
    layer, norm = MeanSparse(alpha=0.5), nn.BatchNorm2d(3)
    for _ in range(5):
        x = torch.randn(8, 3, 6, 6) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1) + 1
        assert torch.equal(layer(x), x.relu())
        norm(x)
    torch.testing.assert_close(layer.running_mean, norm.running_mean)
    # BatchNorm's variance is that of a sample: n / (n - 1) of the population's, n = 8 * 6 * 6.
    torch.testing.assert_close(layer.running_var - 0.9**5, (norm.running_var - 0.9**5) * 287 / 288)
    before = layer.running_mean.clone()
    layer.eval()
    found = layer(x)
    assert torch.equal(layer.running_mean, before)  # evaluation collects nothing
    assert torch.equal(found, mean_sparse(x, layer.running_mean, layer.running_var, 0.5).relu())
    assert not torch.equal(found, x.relu())


def test_alpha_0_is_a_relu_and_a_single_value_is_enough() -> None:
    x = torch.randn(1, 4)
    layer = MeanSparse(alpha=0)
    layer(x)
    torch.testing.assert_close(layer.running_var, torch.full((4,), 0.9))
    assert torch.equal(layer.eval()(x), x.relu())
    assert layer.train()(x[:0]).shape == (0, 4)
    assert layer.running_mean.isfinite().all()


def test_gradients_pass_outside_the_band_alone() -> None:
    x = torch.tensor([[0.1, 2.0], [0.5, -2.0]], requires_grad=True)
    layer = MeanSparse(alpha=0.2).eval()
    layer(x).sum().backward()
    assert layer.running_mean.tolist() == [0, 0]
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_kept_and_statistics_have_at_least_float32(dtype: torch.dtype) -> None:
    layer = MeanSparse()
    x = torch.randn(4, 3, 5).to(dtype)
    assert layer(x).dtype == dtype
    assert layer.running_var.dtype == torch.promote_types(dtype, torch.float32)
    assert layer.eval()(x).dtype == dtype
    assert copy.deepcopy(layer).double().running_mean.dtype == torch.float64


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), MeanSparse(0.5), nn.Flatten(), nn.Linear(4 * 36, 5), MeanSparse(0.5)
    )


def test_statistics_travel_with_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained, x = network(), torch.randn(16, 1, 8, 8)
    for _ in range(3):
        trained(x)
    trained.eval()
    save_weights(tmp_path / "w.safetensors", weights_of(trained), {})
    weights = read_weights(tmp_path / "w.safetensors")
    with torch.device("meta"):
        require_fit(network(), weights, "w")
    seen = network()
    seen(x * 2)  # one that has statistics of its own gets those of the file
    for other in (network(), seen, copy.deepcopy(seen).eval()):
        load_into(other, weights, "w")
        assert torch.equal(other.eval()(x), trained(x))
    without = {name: tensor for name, tensor in weights.items() if "_extra_state" not in name}
    own = seen[1].running_mean.clone()
    load_into(seen, without, "w")
    assert torch.equal(seen[1].running_mean, own)
    fresh = network().eval()
    load_into(fresh, without, "w")
    assert not torch.equal(fresh(x), trained(x))  # the statistics do matter


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (torch.zeros(3, 4), r"shape \(3, 4\); expected \(2, 4\)"),
        (torch.zeros(2, 5), r"shape \(2, 5\); expected \(2, 4\)"),
        (torch.tensor(1.0), r"shape \(\); expected \(2, 4\)"),
        (torch.full((2, 4), math.nan), "not finite means and variances"),
        (torch.full((2, 4), 1e300, dtype=torch.float64), "not finite means and variances"),
        (-torch.ones(2, 4), "not finite means and variances"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(state: torch.Tensor, expected: str) -> None:
    layer = nn.Sequential(MeanSparse())
    layer(torch.randn(3, 4))
    with pytest.raises(UserError, match=f"^weights=w: .*{expected}"):
        load_into(layer, {"0._extra_state": state}, "w")


def test_bad_settings_and_inputs_are_refused() -> None:
    for bad in (-0.1, True, math.nan, "1"):
        with pytest.raises(ValidationError):
            MeanSparse(alpha=bad)
    layer = MeanSparse()
    layer(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="statistics of 3 channels; expected the layer's 5"):
        layer.eval()(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"mean_sparse expects \(N, C, ...\), got \(3,\)"):
        MeanSparse().eval()(torch.zeros(3))
    assert repr(MeanSparse()) == "MeanSparse(alpha=0.2)"
