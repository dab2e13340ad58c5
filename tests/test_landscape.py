"""Loss landscapes and the 1-D fit."""

from functools import partial

import pytest
import torch
from torch import nn

from kwta_exp.activations import KWTA
from kwta_exp.analysis.fit import curve, fit, points
from kwta_exp.analysis.landscape import Landscape, landscape, roughness
from kwta_exp.models import MLP


def test_the_loss_of_a_linear_network_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).requires_grad_(False)
    x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 2])
    found = landscape(network, x, y, extent=0.3, points=5, seed=1)
    assert found.n == 2
    assert found.steps.tolist() == pytest.approx([-0.3, -0.15, 0, 0.15, 0.3])
    assert float(found.loss[2, 2]) == pytest.approx(float(nn.functional.cross_entropy(network(x), y)))

    linear = network[1]
    assert isinstance(linear, nn.Linear)
    wrong = network(x).softmax(1) - nn.functional.one_hot(y, 3)  # the gradient by the logits
    direction = (wrong @ linear.weight).sign().view_as(x)
    along = nn.functional.cross_entropy(network(x + 0.3 * direction), y)
    assert float(found.loss[2, 4]) == pytest.approx(float(along))
    assert (found.loss[2].diff() > 0).all()  # the loss is convex and rises along its gradient


def test_it_depends_neither_on_the_batch_nor_on_the_images_beside_it() -> None:
    torch.manual_seed(0)
    network = MLP(nn.ReLU, [16], num_classes=3, in_channels=1, image_size=(3, 3))
    x, y = torch.rand(3, 1, 3, 3), torch.tensor([0, 1, 2])
    whole = landscape(network, x, y, 0.2, 7, seed=0)
    parts = landscape(network, x, y, 0.2, 7, seed=0, batch=10)
    torch.testing.assert_close(whole.loss, parts.loss)
    one = landscape(network, x[:1], y[:1], 0.2, 7, seed=0)
    two = landscape(network, x[:2], y[:2], 0.2, 7, seed=0)
    assert not torch.allclose(one.loss, two.loss)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_roughness_of_a_plane_is_zero_and_of_kwta_larger_than_of_relu() -> None:
    steps = torch.linspace(-1, 1, 11)
    plane = steps[None, :] + 2 * steps[:, None]
    assert roughness(Landscape(steps, plane, 1)) == pytest.approx(0, abs=1e-6)
    comb = torch.arange(11).remainder(2).expand(11, 11).float()
    assert roughness(Landscape(steps, comb, 1)) == 2  # each second difference is twice the range
    found = {}
    for name, activation in {"kwta": partial(KWTA, ratio=0.1), "relu": nn.ReLU}.items():
        torch.manual_seed(0)
        network = MLP(activation, [200], num_classes=3, in_channels=1, image_size=(4, 4))
        x, y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
        found[name] = roughness(landscape(network, x, y, 0.5, 41, seed=0))
    assert found["kwta"] > 3 * found["relu"]


def test_a_fit_goes_through_its_points_and_only_kwta_jumps_between_them() -> None:
    x, y = points(6)
    assert torch.equal(y, curve(x))
    jumps = {}
    for name, activation in {"kwta": partial(KWTA, ratio=0.2), "relu": nn.ReLU}.items():
        found = fit(activation, 6, [300], 800, seed=0)
        assert found.error < 0.03
        assert float((found.at_points - y).abs().max()) < 0.08
        jumps[name] = len(found.pieces.discontinuities)
    assert jumps["kwta"] > 10
    assert jumps["relu"] == 0
