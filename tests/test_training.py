"""The trainer: resuming, validation, the best epoch, averaging, clipping, errors."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kwta_exp.activations import KWTA
from kwta_exp.attacks import PGD
from kwta_exp.checkpoint import save_state
from kwta_exp.data.batches import Batch, TrainingBatches, split_training
from kwta_exp.data.datasets import Digits
from kwta_exp.errors import UserError
from kwta_exp.runtime import Runtime
from kwta_exp.training import FreeTraining, NaturalTraining, PGDTraining, Training
from kwta_exp.training.objectives.base import correct, eval_mode
from kwta_exp.training.sparsity import Constant, Sparsity
from kwta_exp.training.trainer import Recipe, Trained, Trainer

CPU = torch.device("cpu")
INNER = PGD(norm="linf", eps=0.1, steps=2, keep_best=False)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), KWTA(0.3), nn.Dropout(0.2), nn.Linear(32, 10)
    )


class KilledError(Exception):
    """Raised in place of the end of the process."""


def trainer(
    method: Training, lr: float = 0.1, sparsity: Sparsity | None = None, model: nn.Module | None = None
) -> Trainer:
    recipe = Recipe(
        method,
        optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9),
        lr_schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=method.epochs),
        sparsity=sparsity or Constant(),
    )
    train_split, val = split_training(Digits().load(), None, 0.1, 0, CPU)
    batches = TrainingBatches(train_split, method.batch_size, 1, False, seed=0)
    return Trainer(model or network(), recipe, batches, val, Runtime(accelerator="cpu").fabric())


def train(
    path: Path, method: Training, on_forward: Any = None, checkpoint_seconds: float = 1e9, **others: Any
) -> Trained:
    """Train on digits; ``on_forward`` is a hook before each forward pass, ``others`` go to :func:`trainer`."""
    made = trainer(method, **others)
    if on_forward:
        made.model.register_forward_pre_hook(on_forward)
        if made.average:
            made.average.module.register_forward_pre_hook(on_forward)
    return made.train(path, lambda _: None, checkpoint_seconds)


class KillAfter:
    """A hook that raises at the forward pass after the first ``passes``."""

    def __init__(self, passes: int) -> None:
        self.left = passes

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError


@pytest.mark.parametrize(("method", "epoch_passes"), [
    # Forward passes of an epoch and its validation, e.g. 7 + 1 and 5 * (2 + 1) + 1 + 3.
    (NaturalTraining(epochs=3, batch_size=200), 8),
    (PGDTraining(epochs=2, batch_size=300, attack=INNER), 19),
    (FreeTraining(epochs=3, batch_size=300, replays=2, norm="linf", eps=0.1, probe=INNER), 14),
    (NaturalTraining(epochs=3, batch_size=200, ema_decay=0.9, clip_norm=0.5), 8),
], ids=["natural", "pgd", "free", "averaged"])  # fmt: skip
@pytest.mark.parametrize("checkpoint_seconds", [1e9, 0.0], ids=["epochs", "steps"])
def test_a_resumed_training_equals_an_uninterrupted_one(
    tmp_path: Path, method: Training, epoch_passes: int, checkpoint_seconds: float
) -> None:
    uninterrupted = train(tmp_path / "uninterrupted.pt", method)
    passes = epoch_passes + 3 if checkpoint_seconds else 7  # with a checkpoint at each step, less than an epoch
    kills = 0
    while True:
        try:
            resumed = train(tmp_path / "resumed.pt", method, KillAfter(passes), checkpoint_seconds)
            break
        except KilledError:
            kills += 1
            assert kills < 50
    assert kills >= 1
    assert_same(uninterrupted, resumed)


def assert_same(a: Trained, b: Trained) -> None:
    for one, other in ((a.best, b.best), (a.last, b.last)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert a.best_epoch == b.best_epoch
    without_speed = [
        [{k: v for k, v in record.items() if k != "images_per_second"} for record in trained.history]
        for trained in (a, b)
    ]
    assert without_speed[0] == without_speed[1]


def test_a_state_dict_moves_a_training_to_another_trainer(tmp_path: Path) -> None:
    method = NaturalTraining(epochs=2, batch_size=200, ema_decay=0.9)
    first, second = trainer(method), trainer(method)
    trained = first.train(tmp_path / "a.pt", lambda _: None)
    second.load_state_dict(first.state_dict())
    assert second.epoch == 2
    assert_same(second.train(tmp_path / "b.pt", lambda _: None), trained)


def test_the_best_epoch_has_the_highest_validation_accuracy(tmp_path: Path) -> None:
    trained = train(tmp_path / "s.pt", NaturalTraining(epochs=6, batch_size=64))
    scores = [record["val_accuracy"] for record in trained.history]
    assert scores[-1] > 0.75
    assert scores[trained.best_epoch - 1] == max(scores)
    assert max(scores) not in scores[trained.best_epoch :]  # of equal epochs, the later


def test_averaged_weights_are_validated_and_kept(tmp_path: Path) -> None:
    """Compares with the average computed by hand from the weights after each step."""
    seen: list[dict[str, torch.Tensor]] = []
    model = network()

    def look(module: nn.Module, _: object) -> None:
        if module is model and model.training:  # the average has the hook too
            seen.append({name: value.clone() for name, value in model.state_dict().items()})

    method = NaturalTraining(epochs=1, batch_size=200, ema_decay=0.8)
    trained = train(tmp_path / "s.pt", method, look, model=model)
    seen.append(dict(model.state_dict()))
    average = seen[1]["1.weight"]  # the first update copies
    for weights in seen[2:]:
        average = 0.8 * average + 0.2 * weights["1.weight"]
    torch.testing.assert_close(trained.last["1.weight"], average)
    assert not torch.equal(trained.last["1.weight"], model[1].weight)


def test_the_gradient_of_all_weights_together_is_clipped(tmp_path: Path) -> None:
    """After one step of SGD the weights have changed by the learning rate times the clipped gradient."""
    model = network()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    train(tmp_path / "s.pt", NaturalTraining(epochs=1, batch_size=2000, clip_norm=0.01), lr=0.5, model=model)
    change = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert change.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_adversarial_training_raises_robust_accuracy(tmp_path: Path) -> None:
    def robust_accuracy(method: Training, name: str) -> float:
        model = network()
        model.load_state_dict(train(tmp_path / name, method).last)
        _, val = split_training(Digits().load(), None, 0.1, 0, CPU)
        model.eval()
        x = val.x / 255
        x_adv = PGD(norm="linf", eps=0.1, steps=10)(model, x, val.y, val.index)
        return correct(model(x_adv), val.y).double().mean().item()

    natural = robust_accuracy(NaturalTraining(epochs=8, batch_size=64), "natural.pt")
    adversarial = robust_accuracy(
        PGDTraining(epochs=8, batch_size=64, attack=PGD(norm="linf", eps=0.1, steps=5, keep_best=False)),
        "pgd.pt",
    )
    assert adversarial > natural + 0.1


def test_pgd_training_attacks_in_eval_mode_and_trains_on_attacked_images() -> None:
    seen: dict[str, Any] = {}

    class Spy:
        def __call__(self, model, x, y, keys):  # type: ignore[no-untyped-def]
            seen["modes"] = {m.training for m in model.modules()}
            return 1 - x

    model = network().train()
    model[4].eval()  # a module in eval mode stays so
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
    # BatchNorm updated its statistics once, from the attacked images.
    assert all(torch.equal(after[k], v) for k, v in model.state_dict().items())


def test_natural_training_is_cross_entropy() -> None:
    model = network().train()
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    torch.manual_seed(1)
    loss, logits = NaturalTraining(epochs=1).loss(model, Batch(x, y, y))
    torch.testing.assert_close(loss, -logits.log_softmax(1)[range(8), y].mean())


def test_eval_mode_restores_modes_after_an_error() -> None:
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


def test_divergence_raises_an_error_that_names_the_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"diverged in epoch 1.*optimizer\.lr \(it is 1e\+30\)"):
        train(tmp_path / "s.pt", NaturalTraining(epochs=2), lr=1e30)


def test_a_damaged_state_is_set_aside_and_training_starts_from_the_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.pt"
    first = train(path, NaturalTraining(epochs=1))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = train(path, NaturalTraining(epochs=1))
    assert all(torch.equal(again.last[name], value) for name, value in first.last.items())
    (kept,) = tmp_path.glob("state.pt.damaged-*")
    assert kept.read_bytes() == content
    assert f"training starts from the beginning: {path}: damaged" in caplog.text


KEYS = trainer(NaturalTraining(epochs=1)).state_dict().keys()


@pytest.mark.parametrize("state", [{}, {"epoch": 1}, dict.fromkeys(KEYS), dict.fromkeys(KEYS, 0)])
def test_a_state_of_another_training_is_one_message(tmp_path: Path, state: dict[str, object]) -> None:
    save_state(tmp_path / "state.pt", state)
    with pytest.raises(UserError, match=r"training state .*state\.pt: not of this training"):
        train(tmp_path / "state.pt", NaturalTraining(epochs=1))
