"""Sparsity schedules, and the ratio as a part of a network's state."""

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kwta_exp.activations import KWTA
from kwta_exp.checkpoint import load_into, weights_of
from kwta_exp.errors import UserError
from kwta_exp.models import MLP
from kwta_exp.training.sparsity import Constant, Cosine, Incremental, Linear, layers_with_ratio, set_ratio


def test_the_incremental_schedule_is_the_studys() -> None:
    schedule = Incremental(start=0.2, final=0.08, step=0.005, every=2)
    ratios = [schedule.ratio(epoch, 60) for epoch in range(60)]
    assert ratios[:5] == [0.2, 0.2, 0.195, 0.195, 0.19]
    assert ratios[46:50] == [0.085, 0.085, 0.08, 0.08]
    assert set(ratios[48:]) == {0.08}
    held = Incremental(start=0.2, final=0.08, step=0.005, every=2, hold=10)
    assert [held.ratio(epoch + 10, 60) for epoch in range(50)] == ratios[:50]
    assert {held.ratio(epoch, 60) for epoch in range(10)} == {0.2}
    # A step never goes below the final ratio.
    assert Incremental(start=0.2, final=0.15, step=0.04, every=1).ratio(2, 9) == 0.15


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_smooth_schedules_fall_from_start_to_final(kind: type[Linear] | type[Cosine]) -> None:
    schedule = kind(start=0.5, final=0.1, over=0.5)
    ratios = [schedule.ratio(epoch, 20) for epoch in range(20)]
    assert ratios[0] == 0.5
    assert ratios[9:] == pytest.approx([0.1] * 11)
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios[:10])) == 10
    middle = kind(start=0.5, final=0.1, over=1.0).ratio(10, 21)
    assert middle == pytest.approx(0.3)
    assert kind(start=0.5, final=0.1).ratio(0, 1) == 0.5  # a single epoch


def test_a_schedule_that_rises_is_refused() -> None:
    for kind in (Incremental, Linear, Cosine):
        with pytest.raises(ValueError, match=r"final=0\.3 is above start=0\.2"):
            kind(start=0.2, final=0.3)


def test_set_ratio_sets_every_layer_that_has_a_ratio() -> None:
    model = nn.Sequential(KWTA(0.5), nn.Sequential(KWTA(k=3), KWTA(0.4)), nn.ReLU())
    set_ratio(model, 0.1)
    assert [layer.ratio for layer in layers_with_ratio(model)] == [0.1, 0.1]
    assert model[1][0].k == 3
    with pytest.raises(ValueError, match="no k-WTA layer with a ratio"):
        set_ratio(nn.ReLU(), 0.1)
    assert Constant().ratio(3, 9) is None


def test_a_resumed_training_continues_the_schedule(tmp_path: Path) -> None:
    from kwta_exp.training import NaturalTraining
    from tests.test_training import KillAfter, KilledError, train

    method = NaturalTraining(epochs=4, batch_size=300, ema_decay=0.9)
    schedule = Incremental(start=0.5, final=0.3, step=0.1, every=1)

    def model() -> nn.Module:
        torch.manual_seed(0)
        sparse = partial(KWTA, ratio=0.9)
        return MLP(sparse, hidden=[16], num_classes=10, in_channels=1, image_size=(8, 8))

    uninterrupted = train(tmp_path / "uninterrupted.pt", method, sparsity=schedule, model=model())
    assert [record["sparsity_ratio"] for record in uninterrupted.history] == [0.5, 0.4, 0.3, 0.3]
    assert uninterrupted.best_epoch in (3, 4)  # only epochs at the last ratio compete
    for weights in (uninterrupted.best, uninterrupted.last):
        loaded = model()
        loaded.load_state_dict(weights)
        assert [layer.ratio for layer in layers_with_ratio(loaded)] == [0.3]

    with pytest.raises(KilledError):
        train(tmp_path / "resumed.pt", method, KillAfter(9), sparsity=schedule, model=model())
    resumed_model = model()
    resumed = train(tmp_path / "resumed.pt", method, sparsity=schedule, model=resumed_model)
    assert all(torch.equal(uninterrupted.last[name], resumed.last[name]) for name in uninterrupted.last)
    assert [layer.ratio for layer in layers_with_ratio(resumed_model)] == [0.3]


def network(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 2))


def test_the_state_dict_holds_the_ratio() -> None:
    state = network(partial(KWTA, 0.3)).state_dict()
    assert torch.equal(state["1._extra_state"], torch.tensor(0.3, dtype=torch.float64))
    loaded = network(partial(KWTA, 0.7))
    loaded.load_state_dict(state)
    assert loaded[1].ratio == 0.3


@pytest.mark.parametrize("load", [
    lambda model, state: model.load_state_dict(state, strict=True),
    lambda model, state: load_into(model, state, "relu.pth"),
], ids=["load_state_dict", "load_into"])  # fmt: skip
def test_weights_without_a_ratio_leave_the_layers_own(load: Callable[[nn.Module, Any], object]) -> None:
    relu, sparse = network(nn.ReLU), network(partial(KWTA, 0.7))
    load(sparse, relu.state_dict())
    assert torch.equal(sparse[0].weight, relu[0].weight)
    assert sparse[1].ratio == 0.7
    layer = KWTA(0.7)
    load(layer, {})
    assert layer.ratio == 0.7


def test_weights_with_a_ratio_load_into_a_network_with_another_activation() -> None:
    sparse, relu = network(partial(KWTA, 0.3)), network(nn.ReLU)
    load_into(relu, weights_of(sparse), "sparse.safetensors")
    assert torch.equal(relu[2].bias, sparse[2].bias)


def test_a_layer_with_a_fixed_k_has_no_ratio_in_its_state() -> None:
    fixed, sparse = network(partial(KWTA, k=2)), network(partial(KWTA, 0.3))
    for mine, other in ((fixed, sparse), (sparse, fixed)):
        load_into(mine, weights_of(other), "w")
    assert (fixed[1].k, fixed[1].ratio) == (2, None)
    assert (sparse[1].k, sparse[1].ratio) == (None, 0.3)


def test_a_copy_and_a_pickle_of_a_layer_keep_its_ratio() -> None:
    layer = KWTA(0.3)
    layer.ratio = 0.2
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.ratio == 0.2
    half = network(partial(KWTA, 0.3)).half().state_dict()
    assert half["1._extra_state"].item() == 0.3


@pytest.mark.parametrize("value", [
    torch.tensor(math.nan, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64),
    torch.tensor(0.0, dtype=torch.float64), torch.tensor([0.3, 0.3], dtype=torch.float64),
    torch.tensor(0.3, dtype=torch.float16), torch.tensor(1), torch.tensor(0.3, dtype=torch.float64).to("meta"),
], ids=["nan", "2", "0", "shape", "float16", "int", "meta"])  # fmt: skip
@pytest.mark.parametrize("activation", [partial(KWTA, 0.3), partial(KWTA, k=2)], ids=["ratio", "k"])
def test_a_bad_ratio_in_a_checkpoint_is_one_message(
    activation: Callable[[], nn.Module], value: torch.Tensor
) -> None:
    model = network(activation)
    with pytest.raises(
        UserError, match=r"^weights=w\.pth: a k-WTA layer's ratio is .*; expected a float64 scalar"
    ):
        load_into(model, {**weights_of(model), "1._extra_state": value}, "w.pth")
    assert activation().ratio == model[1].ratio
