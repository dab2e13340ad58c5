"""Sparsity schedules: pure functions of the epoch, and what they do to a training and its checkpoints."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from kwta_exp.activations import KWTA
from kwta_exp.models import MLP
from kwta_exp.training.sparsity import Constant, Cosine, Incremental, Linear, scheduled, set_ratio


def test_the_studys_incremental_schedule() -> None:
    schedule = Incremental(start=0.2, final=0.08, step=0.005, every=2)
    ratios = [schedule.ratio(epoch, 60) for epoch in range(60)]
    assert ratios[:5] == [0.2, 0.2, 0.195, 0.195, 0.19]
    assert ratios[46:50] == [0.085, 0.085, 0.08, 0.08]
    assert set(ratios[48:]) == {0.08}
    held = Incremental(start=0.2, final=0.08, step=0.005, every=2, hold=10)
    assert [held.ratio(epoch + 10, 60) for epoch in range(50)] == ratios[:50]
    assert {held.ratio(epoch, 60) for epoch in range(10)} == {0.2}
    # A step that would jump over the end stops at it.
    assert Incremental(start=0.2, final=0.15, step=0.04, every=1).ratio(2, 9) == 0.15


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_smooth_schedules_go_from_start_to_final(kind: type[Linear] | type[Cosine]) -> None:
    schedule = kind(start=0.5, final=0.1, over=0.5)
    ratios = [schedule.ratio(epoch, 20) for epoch in range(20)]
    assert ratios[0] == 0.5
    assert ratios[9:] == pytest.approx([0.1] * 11)
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios[:10])) == 10
    middle = kind(start=0.5, final=0.1, over=1.0).ratio(10, 21)
    assert middle == pytest.approx(0.3)
    assert kind(start=0.5, final=0.1).ratio(0, 1) == 0.5  # too short to fall


def test_a_ratio_that_rises_is_refused() -> None:
    for kind in (Incremental, Linear, Cosine):
        with pytest.raises(ValueError, match=r"final=0\.3 is above start=0\.2"):
            kind(start=0.2, final=0.3)


def test_set_ratio_moves_every_layer_that_has_one() -> None:
    model = nn.Sequential(KWTA(0.5), nn.Sequential(KWTA(k=3), KWTA(0.4)), nn.ReLU())
    set_ratio(model, 0.1)
    assert [layer.ratio for layer in scheduled(model)] == [0.1, 0.1]
    assert model[1][0].k == 3
    with pytest.raises(ValueError, match="no k-WTA layer with a ratio"):
        set_ratio(nn.ReLU(), 0.1)
    assert Constant().ratio(3, 9) is None


def test_the_ratio_travels_with_the_training(tmp_path: Path) -> None:
    """Log, checkpoint, resume: a training killed between two ratios goes on at the right one."""
    from kwta_exp.training import NaturalTraining
    from tests.test_training import After, KilledError, train

    training = NaturalTraining(epochs=4, batch_size=300)
    schedule = Incremental(start=0.5, final=0.3, step=0.1, every=1)

    def model() -> nn.Module:
        torch.manual_seed(0)
        sparse = partial(KWTA, ratio=0.9)
        return MLP(sparse, hidden=[16], num_classes=10, in_channels=1, image_size=(8, 8))

    whole = train(tmp_path / "whole.pt", training, sparsity=schedule, model=model())
    assert [record["sparsity_ratio"] for record in whole.history] == [0.5, 0.4, 0.3, 0.3]
    assert whole.sparsity_ratio == 0.3
    assert whole.best_epoch in (3, 4)  # only epochs of the last ratio compete
    with pytest.raises(KilledError):
        train(tmp_path / "pieces.pt", training, After(9), sparsity=schedule, model=model())
    resumed_model = model()
    resumed = train(tmp_path / "pieces.pt", training, sparsity=schedule, model=resumed_model)
    assert all(torch.equal(whole.last[name], resumed.last[name]) for name in whole.last)
    assert [layer.ratio for layer in scheduled(resumed_model)] == [0.3]
