"""The pieces of networks along lines: where they meet, and where the output jumps."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kwta_exp.activations import KWTA, LWTA
from kwta_exp.analysis.pieces import FIRST_CELLS, Patterns, Pieces, along, around, pieces
from kwta_exp.errors import UserError
from kwta_exp.models import MLP

WIDTH = 40


def line_network(activation: object, hidden: list[int], seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(activation, hidden, num_classes=2, in_channels=1, image_size=(1, 1)).double()  # type: ignore[arg-type]


def on_the_line(network: nn.Module, low: float = -3, high: float = 3) -> Pieces:
    return pieces(along(Patterns(network), torch.zeros(1, 1, 1), torch.ones(1, 1, 1), None), low, high)


def test_steps_of_a_known_function_are_found_where_they_are() -> None:
    edges = torch.tensor([0.1, 0.25, 0.7, 0.7 + 3 / FIRST_CELLS])  # the last two are close, and undo each other
    heights = torch.tensor([0.0, 1.0, 1.5, 4.0, 1.5])

    def steps(t: Tensor) -> tuple[Tensor, Tensor]:
        which = torch.bucketize(t, edges.double())
        return heights.double()[which][:, None], torch.tensor([0, 1, 2, 3, 2])[which]

    found = pieces(steps, 0, 1)
    assert found.changes == pytest.approx(edges.numpy(), abs=1e-8)
    assert found.jumps == pytest.approx([1, 0.5, 2.5, 2.5])
    assert found.scale == 4
    assert found.density == 4


def test_all_changes_of_winners_of_one_layer_are_found() -> None:
    k = 6
    network = line_network(partial(KWTA, k=k), [WIDTH])
    first = network.nn[1]
    assert isinstance(first, nn.Linear)
    slope, offset = first.weight.detach()[:, 0], first.bias.detach()
    crossings = sorted(
        x
        for i, j in itertools.combinations(range(WIDTH), 2)
        if -3 < (x := float((offset[j] - offset[i]) / (slope[i] - slope[j]))) < 3
    )

    def winners(x: float) -> frozenset[int]:
        return frozenset((slope * x + offset).topk(k).indices.tolist())

    between = [(a + b) / 2 for a, b in itertools.pairwise([-3, *crossings, 3])]
    expected = [
        crossing
        for crossing, (before, after) in zip(crossings, itertools.pairwise(map(winners, between)), strict=True)
        if before != after
    ]
    found = on_the_line(network)
    assert len(expected) > 10
    assert found.changes == pytest.approx(expected, abs=1e-7)
    assert len(found.discontinuities) == len(expected)


def test_the_pieces_of_a_relu_network_meet() -> None:
    network = line_network(nn.ReLU, [WIDTH])
    first = network.nn[1]
    assert isinstance(first, nn.Linear)
    zeros = (-first.bias / first.weight[:, 0]).detach()
    found = on_the_line(network)
    assert found.changes == pytest.approx(sorted(zeros[zeros.abs() < 3].tolist()), abs=1e-7)
    assert len(found.discontinuities) == 0
    assert len(on_the_line(line_network(nn.ReLU, [WIDTH, WIDTH])).discontinuities) == 0


@pytest.mark.parametrize("activation", [partial(KWTA, ratio=0.2), LWTA], ids=["kwta", "lwta"])
def test_at_a_discontinuity_the_limits_differ_and_elsewhere_the_function_is_affine(activation: object) -> None:
    network = line_network(activation, [WIDTH, WIDTH])
    found = on_the_line(network)
    at = found.discontinuities
    assert len(at) > 10
    values = {
        side: Patterns(network).at(torch.from_numpy(at + side * 1e-6).view(-1, 1, 1, 1))[0] for side in (-1, 1)
    }
    measured = (values[1] - values[-1]).abs().amax(1)
    jumps = found.jumps[np.isin(found.changes, at)]
    assert measured.numpy() == pytest.approx(jumps, abs=1e-4)

    ends = np.array([-3, *found.changes, 3])
    inner = np.linspace(ends[:-1], ends[1:], 5)[1:-1]  # three places inside each piece
    logits, numbers = Patterns(network).at(torch.from_numpy(inner.ravel()).view(-1, 1, 1, 1))
    left, middle, right = logits.view(3, -1, 2)
    assert (left - 2 * middle + right).abs().max() < 1e-9
    assert (numbers.view(3, -1) == numbers.view(3, -1)[0]).all()


def test_activity_counts_units_that_are_not_zero() -> None:
    layer = nn.Linear(1, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [-1.0], [0.0], [2.0]]))
    network = nn.Sequential(layer, nn.ReLU())
    assert Patterns(network).activity(torch.tensor([[1.0], [2.0]])) == (0.5, 0.0)
    assert Patterns(network, batch=1).activity(torch.tensor([[1.0], [-2.0]])) == (0.75, 0.75)


def test_a_network_without_such_layers_is_one_message() -> None:
    with pytest.raises(UserError, match="Linear: has no layer of the kinds KWTA, LWTA and ReLU"):
        Patterns(nn.Linear(1, 1))


def test_lines_around_images_stay_in_the_images_and_leave_the_network_alone() -> None:
    torch.manual_seed(0)
    network = MLP(partial(KWTA, ratio=0.2), [WIDTH], num_classes=3, in_channels=1, image_size=(2, 2)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    seen: list[Tensor] = []
    patterns = Patterns(network)
    patterns.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.tensor([0.0, 0.5, 0.95, 1.0]).view(1, 1, 2, 2).repeat(2, 1, 1, 1)
    first, second = around(patterns, x, 0.1, seed=3)
    inputs = torch.cat(seen)
    assert inputs.min() == 0
    assert inputs.max() == 1
    assert (inputs - x[0]).abs().max() == pytest.approx(0.1)
    assert first.changes.tolist() != second.changes.tolist()  # each image has its own direction
    again, _ = around(Patterns(network), x, 0.1, seed=3)
    assert again.changes.tolist() == first.changes.tolist()
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
