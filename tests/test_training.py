"""Training: resumes bit for bit, minds modes and BatchNorm, picks the right epoch, refuses NaN."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from kwta_exp.activations import KWTA
from kwta_exp.attacks import PGD
from kwta_exp.checkpoint import save_state
from kwta_exp.data.batches import Batch, TrainingBatches, split_training
from kwta_exp.data.datasets import Digits
from kwta_exp.errors import UserError
from kwta_exp.training import FreeTraining, NaturalTraining, PGDTraining, Training
from kwta_exp.training.fit import STATE, Fitted, fit
from kwta_exp.training.objectives.base import correct, eval_mode
from kwta_exp.training.sparsity import Constant, Sparsity

CPU = torch.device("cpu")
INNER = PGD(norm="linf", eps=0.1, steps=2, keep_best=False)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), KWTA(0.3), nn.Dropout(0.2), nn.Linear(32, 10)
    )


class KilledError(Exception):
    """Stands for the end of the process."""


def train(
    path: Path, training: Training, on_step: Any = None, seconds: float = 1e9, lr: float = 0.1,
    sparsity: Sparsity | None = None, model: nn.Module | None = None,
) -> Fitted:  # fmt: skip
    train_split, val = split_training(Digits().load(), None, 0.1, 0, CPU)
    batches = TrainingBatches(train_split, training.batch_size, 1, False, seed=0)
    model = model or network()
    if on_step:
        model.register_forward_pre_hook(on_step)
    fabric = Fabric(accelerator="cpu")
    return fit(model, training, batches, val, partial(torch.optim.SGD, lr=lr, momentum=0.9),
               partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=training.epochs),
               sparsity or Constant(), fabric, path, lambda _: None, checkpoint_seconds=seconds)  # fmt: skip


class After:
    """Raises at the n-th forward pass."""

    def __init__(self, passes: int) -> None:
        self.left = passes

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError


@pytest.mark.parametrize(("training", "epoch_passes"), [
    # Forward passes of an epoch and its validation: 7 + 1, and 5 * (2 + 1) + 1 + 3.
    (NaturalTraining(epochs=3, batch_size=200), 8),
    (PGDTraining(epochs=2, batch_size=300, attack=INNER), 19),
    (FreeTraining(epochs=3, batch_size=300, replays=2, norm="linf", eps=0.1, probe=INNER), 14),
    (NaturalTraining(epochs=3, batch_size=200, ema_decay=0.9, clip_norm=0.5), 8),
], ids=["natural", "pgd", "free", "averaged"])  # fmt: skip
@pytest.mark.parametrize("seconds", [1e9, 0.0], ids=["epochs", "steps"])
def test_a_resumed_training_is_the_uninterrupted_one(
    tmp_path: Path, training: Training, epoch_passes: int, seconds: float
) -> None:
    whole = train(tmp_path / "whole.pt", training)
    kills = 0
    while True:
        try:
            # Each life outlasts an epoch, or with saves at every step not even that.
            pieces = train(tmp_path / "pieces.pt", training, After(epoch_passes + 3 if seconds else 7), seconds)
            break
        except KilledError:
            kills += 1
            assert kills < 50
    assert kills >= 1
    for a, b in ((whole.best, pieces.best), (whole.last, pieces.last)):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole.best_epoch == pieces.best_epoch
    timeless = [
        [{k: v for k, v in r.items() if k != "images_per_second"} for r in f.history] for f in (whole, pieces)
    ]
    assert timeless[0] == timeless[1]


def test_training_learns_and_the_best_epoch_is_the_validations(tmp_path: Path) -> None:
    fitted = train(tmp_path / "s.pt", NaturalTraining(epochs=6, batch_size=64))
    scores = [record["val_accuracy"] for record in fitted.history]
    assert scores[-1] > 0.75
    assert scores[fitted.best_epoch - 1] == max(scores)
    assert max(scores) not in scores[fitted.best_epoch :]  # of equals, the later


def test_averaged_weights_are_validated_and_kept(tmp_path: Path) -> None:
    """Against the average computed by hand from the weights after every step."""
    seen: list[dict[str, torch.Tensor]] = []
    model = network()

    def look(module: nn.Module, _: object) -> None:
        if module is model and model.training:  # not its average, which has the hook too
            seen.append({name: value.clone() for name, value in model.state_dict().items()})

    training = NaturalTraining(epochs=1, batch_size=200, ema_decay=0.8)
    fitted = train(tmp_path / "s.pt", training, look, model=model)
    seen.append(dict(model.state_dict()))
    average = seen[1]["1.weight"]  # the first update copies
    for weights in seen[2:]:
        average = 0.8 * average + 0.2 * weights["1.weight"]
    torch.testing.assert_close(fitted.last["1.weight"], average)
    assert not torch.equal(fitted.last["1.weight"], model[1].weight)


def test_gradients_are_clipped_together(tmp_path: Path) -> None:
    """With one step of SGD the change of all weights is the learning rate times the clipped gradient."""
    model = network()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    train(tmp_path / "s.pt", NaturalTraining(epochs=1, batch_size=2000, clip_norm=0.01), lr=0.5, model=model)
    change = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert change.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_adversarial_training_resists_its_own_attack(tmp_path: Path) -> None:
    def robust(training: Training, name: str) -> float:
        fitted = train(tmp_path / name, training)
        model = network()
        model.load_state_dict(fitted.last)
        _, val = split_training(Digits().load(), None, 0.1, 0, CPU)
        model.eval()
        x = val.x / 255
        x_adv = PGD(norm="linf", eps=0.1, steps=10)(model, x, val.y, val.index)
        return correct(model(x_adv), val.y).double().mean().item()

    natural = robust(NaturalTraining(epochs=8, batch_size=64), "natural.pt")
    adversarial = robust(
        PGDTraining(epochs=8, batch_size=64, attack=PGD(norm="linf", eps=0.1, steps=5, keep_best=False)),
        "pgd.pt",
    )
    assert adversarial > natural + 0.1


def test_pgd_training_uses_the_attack_in_eval_mode_and_trains_on_its_images() -> None:
    seen: dict[str, Any] = {}

    class Spy:
        def __call__(self, model, x, y, keys):  # type: ignore[no-untyped-def]
            seen["modes"] = {m.training for m in model.modules()}
            return 1 - x

    model = network().train()
    model[4].eval()  # a module that someone froze stays frozen
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    loss, logits = PGDTraining(epochs=1, attack=Spy()).loss(model, Batch(x, y, y))

    assert seen["modes"] == {False}
    assert model.training
    assert not model[4].training
    after = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(before)
    expected = model(1 - x)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, -expected.log_softmax(1)[range(8), y].mean())
    # BatchNorm took its statistics from the attacked images, once.
    assert all(torch.equal(after[k], v) for k, v in model.state_dict().items())


def test_natural_training_is_cross_entropy() -> None:
    model = network().train()
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    torch.manual_seed(1)
    loss, logits = NaturalTraining(epochs=1).loss(model, Batch(x, y, y))
    torch.testing.assert_close(loss, -logits.log_softmax(1)[range(8), y].mean())


def test_eval_mode_puts_modes_back_after_an_error() -> None:
    model = network().train()
    modes = []

    def stumble() -> None:
        with eval_mode(model):
            modes.append(model.training)
            raise KilledError

    with pytest.raises(KilledError):
        stumble()
    assert modes == [False]
    assert all(m.training for m in model.modules())


def test_divergence_is_an_error_that_names_the_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"diverged in epoch 1.*optimizer\.lr \(it is 1e\+30\)"):
        train(tmp_path / "s.pt", NaturalTraining(epochs=2), lr=1e30)


def test_a_damaged_state_is_kept_aside_and_training_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.pt"
    whole = train(path, NaturalTraining(epochs=1))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = train(path, NaturalTraining(epochs=1))
    assert all(torch.equal(again.last[name], value) for name, value in whole.last.items())
    (kept,) = tmp_path.glob("state.pt.damaged-*")
    assert kept.read_bytes() == content
    assert f"training begins anew: {path}: damaged" in caplog.text


@pytest.mark.parametrize("state", [{}, {"epoch": 1}, dict.fromkeys(STATE), dict.fromkeys(STATE, 0)])
def test_a_state_of_another_training_is_one_message(tmp_path: Path, state: dict[str, object]) -> None:
    save_state(tmp_path / "state.pt", state)
    with pytest.raises(UserError, match=r"training state .*state\.pt"):
        train(tmp_path / "state.pt", NaturalTraining(epochs=1))
