"""Objectives: each equals its formula, with the BatchNorm statistics and modes that are documented."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kwta_exp.attacks import PGD
from kwta_exp.attacks.losses import divergence
from kwta_exp.data.batches import Batch
from kwta_exp.training import (
    ALPTraining,
    FastTraining,
    FreeTraining,
    MARTTraining,
    NaturalTraining,
    PGDTraining,
    TRADESTraining,
    Training,
)
from kwta_exp.training.objectives.base import correct


class Shift:
    """An attack that adds a constant and records the mode of the network."""

    def __init__(self) -> None:
        self.modes: set[bool] = set()

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        self.modes |= {module.training for module in model.modules()}
        return (x + 0.1).clamp(0, 1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(9, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4)
    ).double()


def batch() -> Batch:
    x = torch.rand(10, 1, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    return Batch(x, torch.arange(10) % 4, torch.arange(10))


def p(logits: Tensor) -> Tensor:
    return torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)


def ce(logits: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    target = torch.full_like(logits, smoothing / logits.shape[1])
    target[range(len(y)), y] += 1 - smoothing
    return -(target * torch.log(p(logits))).sum(1).mean()


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of two rows of probabilities."""
    return (a * (torch.log(a) - torch.log(b))).sum(1)


def trades(model: nn.Module, b: Batch) -> Tensor:
    z, z_adv = model(b.x), model((b.x + 0.1).clamp(0, 1))
    return ce(z, b.y, 0.1) + 6 * kl(p(z), p(z_adv)).mean()


def mart(model: nn.Module, b: Batch) -> Tensor:
    q, q_adv = p(model(b.x)), p(model((b.x + 0.1).clamp(0, 1)))
    rows = torch.arange(len(b.y))
    wrong = torch.stack([torch.cat([row[:y], row[y + 1 :]]).max() for row, y in zip(q_adv, b.y, strict=True)])
    bce = -torch.log(q_adv[rows, b.y]) - torch.log(1.0001 - wrong)
    return (bce + 5 * kl(q, q_adv) * (1 - q[rows, b.y])).mean()


def alp(model: nn.Module, b: Batch) -> Tensor:
    z = model(torch.cat([b.x, (b.x + 0.1).clamp(0, 1)]))
    clean, adv = z[:10], z[10:]
    return ce(adv, b.y) + 0.5 * ((clean - adv) ** 2).sum() / clean.numel()


CASES: list[tuple[Any, Any]] = [
    (lambda a: NaturalTraining(epochs=1, label_smoothing=0.2), lambda m, b: ce(m(b.x), b.y, 0.2)),
    (lambda a: PGDTraining(epochs=1, attack=a), lambda m, b: ce(m((b.x + 0.1).clamp(0, 1)), b.y)),
    (lambda a: FastTraining(epochs=1, attack=a, probe=a), lambda m, b: ce(m((b.x + 0.1).clamp(0, 1)), b.y)),
    (lambda a: TRADESTraining(epochs=1, attack=a, label_smoothing=0.1), trades),
    (lambda a: MARTTraining(epochs=1, attack=a), mart),
    (lambda a: ALPTraining(epochs=1, attack=a), alp),
]


@pytest.mark.parametrize(("make", "formula"), CASES, ids=["natural", "pgd", "fast", "trades", "mart", "alp"])
def test_loss_gradients_and_batch_norm_statistics_equal_the_formula(make: Any, formula: Any) -> None:
    attack, ours, theirs = Shift(), network().train(), network().train()
    training: Training = make(attack)

    loss, logits = training.loss(ours, batch())
    loss.backward()
    expected = formula(theirs, batch())
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-9)
    # BatchNorm saw the same images in the same order; the attack saw the network in eval mode.
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other)
    assert attack.modes <= {False}
    assert all(module.training for module in ours.modules())
    assert logits.shape == (10, 4)


def test_kl_attack_of_trades_maximises_the_divergence_from_a_small_normal_start() -> None:
    model, b = network().eval(), batch()
    attack = PGD(norm="linf", eps=0.1, steps=10, loss="kl", random_start="normal", keep_best=False)
    x_adv = attack(model, b.x, b.y, b.keys)
    random = b.x + 0.1 * torch.sign(torch.randn(b.x.shape, generator=torch.Generator().manual_seed(0)))
    reached, chance = (kl(p(model(b.x)), p(model(x))).mean() for x in (x_adv, random))
    assert reached > 2 * chance
    torch.testing.assert_close(divergence(model(x_adv), model(b.x)).mean(), reached)
    # A step of size 0 returns the random start: 0.001 times a normal draw.
    start = PGD(norm="linf", eps=0.1, steps=1, step_size=0.0, random_start="normal", keep_best=False)
    assert 0.0005 < (start(model, b.x, b.y, b.keys) - b.x).std() < 0.002


def test_free_training_equals_algorithm_1_of_shafahi_et_al() -> None:
    eps, replays = 0.05, 3
    training = FreeTraining(epochs=1, replays=replays, norm="linf", eps=eps, probe=Shift())
    model, reference, memory = network().train(), network().train(), {}
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference))
    delta = torch.zeros(10, 1, 3, 3).double()
    for size in (10, 6, 10):  # a smaller batch updates the first perturbations only
        b = Batch(batch().x[:size], batch().y[:size], batch().keys[:size])
        steps = 0
        for loss, _ in training.losses(model, b, memory):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        assert steps == replays

        for _ in range(replays):  # Shafahi et al. 2019, algorithm 1
            x_adv = (b.x + delta[:size]).clamp(0, 1).requires_grad_()
            loss = ce(reference(x_adv), b.y)
            other.zero_grad()
            loss.backward()
            delta[:size] = (delta[:size] + eps * x_adv.grad.sign()).clamp(-eps, eps)  # type: ignore[union-attr]
            other.step()
        torch.testing.assert_close(memory["delta"], delta)
    assert delta.abs().max() > 0
    for mine, theirs in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_robustly_correct_uses_the_attack_of_the_method() -> None:
    model, b = network().eval(), batch()
    attacked = correct(model((b.x + 0.1).clamp(0, 1)), b.y)
    for training in (
        PGDTraining(epochs=1, attack=Shift()),
        FreeTraining(epochs=1, norm="linf", eps=0.1, probe=Shift()),
        FastTraining(epochs=1, attack=PGD(norm="linf", eps=0.1), probe=Shift()),
    ):
        assert torch.equal(training.robustly_correct(model, b), attacked)
    assert NaturalTraining(epochs=1).robustly_correct(model, b) is None


def test_fast_training_warns_of_catastrophic_overfitting_only() -> None:
    training = FastTraining(epochs=9, attack=Shift(), probe=Shift())

    def history(*pairs: tuple[float, float]) -> list[dict[str, float]]:
        return [
            {"epoch": i + 1, "accuracy": one_step, "val_robust_accuracy": probe}
            for i, (one_step, probe) in enumerate(pairs)
        ]

    assert training.warning(history((0.4, 0.3), (0.5, 0.4), (0.6, 0.35))) is None
    said = training.warning(history((0.4, 0.3), (0.5, 0.4), (0.8, 0.01)))
    assert said is not None
    assert "catastrophic overfitting in epoch 3: validation accuracy under the probe is 1.0%" in said
    assert "40.0% in epoch 2" in said
    # If training accuracy falls too, it is another failure.
    assert training.warning(history((0.4, 0.3), (0.5, 0.4), (0.1, 0.01))) is None
