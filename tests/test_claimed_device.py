"""On a claimed GPU (tests/claimed.py) nothing mixes devices, results are the CPU's, and few steps wait."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from kwta_exp import hardware
from kwta_exp.activations import KWTA
from kwta_exp.attacks import (
    APGD,
    BPDA,
    NES,
    PGD,
    Attack,
    AutoAttack,
    EvolutionStrategies,
    RelaxedTransfer,
    SmoothedPGD,
    Square,
    Threat,
    Transfer,
    as_attack,
)
from kwta_exp.data.batches import Batch, Split, TrainingBatches
from kwta_exp.evaluation import Evaluation
from kwta_exp.evaluation.checks import diagnose
from kwta_exp.evaluation.query_counter import QueryCounter
from kwta_exp.runtime import Runtime
from kwta_exp.training.objectives import (
    ALPTraining,
    FastTraining,
    FreeTraining,
    MARTTraining,
    NaturalTraining,
    PGDTraining,
    TRADESTraining,
    Training,
)
from kwta_exp.training.sparsity import Constant
from kwta_exp.training.trainer import Recipe, Trained, Trainer
from tests import claimed
from tests.claimed import DEVICE, MixedDevicesError, claimed_gpu, network_on_gpu, on_gpu, values

N = 12
STEPS = 5


def small_network(activation: Callable[[], nn.Module]) -> nn.Module:
    """For images ``(N, 1, 8, 8)``, in float64, where the size of a batch does not change any outcome."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), activation(), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6),
        activation(), nn.Flatten(), nn.Linear(6 * 64, 10),
    ).double().eval()  # fmt: skip


def some_images(n: int = N) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def attacks(norm: Any, eps: float) -> dict[str, Attack]:
    ball = {"norm": norm, "eps": eps}
    return {
        "pgd": PGD(**ball, steps=STEPS, restarts=2),
        "fgsm": PGD(**ball, steps=1, step_size=eps, random_start=False),
        "mim": PGD(**ball, steps=STEPS, momentum=1.0),
        "trades": PGD(**ball, steps=STEPS, loss="kl", random_start="normal", keep_best=False),
        "pgd_t": PGD(**ball, steps=STEPS, targets=2, loss="dlr"),
        "apgd": APGD(**ball, steps=2 * STEPS, restarts=2),
        "apgd_t": APGD(**ball, steps=STEPS, targets=2),
        "anneal": BPDA(**ball, steps=STEPS, restarts=2),
        "bpda": BPDA(**ball, steps=STEPS, restarts=2, ascent="pgd"),
        "bpda_apgd": BPDA(**ball, steps=STEPS, restarts=2, ascent="apgd"),
        "relaxed": RelaxedTransfer(**ball, steps=STEPS, restarts=2),
        "smoothed": SmoothedPGD(**ball, steps=STEPS, samples=2),
        "es": EvolutionStrategies(**ball, steps=3, samples=6),
        **({"nes": NES(**ball)} if norm == "linf" else {}),
        "function": as_attack(lambda model, x, y, keys: x + eps * model(x).sum().sign(), Threat(**ball)),
    }


@pytest.mark.parametrize(
    ("name", "norm"), [(name, norm) for norm in ("linf", "l2") for name in attacks(norm, 0.1)]
)
def test_attacks_find_on_a_gpu_what_they_find_on_a_cpu(name: str, norm: Any) -> None:
    eps = 0.05 if norm == "linf" else 0.4
    threat, attack, x = Threat(norm=norm, eps=eps), attacks(norm, eps)[name], some_images()
    network = small_network(partial(KWTA, 0.3)).requires_grad_(False)
    y, keys = network(x).argmax(1), torch.arange(N) * 977
    if name == "nes":  # a million queries for an image that is never fooled
        y = (y + 1) % 10

    here = QueryCounter(network, x, y, threat)
    expected = attack(here, x.clone(), y, keys, 5)
    with claimed_gpu():
        there = QueryCounter(network_on_gpu(copy.deepcopy(network)), on_gpu(x), on_gpu(y), threat)
        x_adv = attack(there, on_gpu(x), on_gpu(y), on_gpu(keys), 5)
        assert x_adv.device == DEVICE
    torch.testing.assert_close(values(x_adv), expected, rtol=0, atol=1e-9)
    for what in ("fooled", "queries", "steps"):
        assert values(getattr(there, what)).tolist() == getattr(here, what).tolist()
    assert there.forwards >= here.forwards  # fooled images leave the batch later


def test_the_attacks_compared_fool_some_images_and_not_all() -> None:
    network, x = small_network(partial(KWTA, 0.3)).requires_grad_(False), some_images()
    y = network(x).argmax(1)
    shares = {}
    for name, attack in attacks("linf", 0.05).items():
        if name != "nes":
            counter = QueryCounter(network, x, y, Threat(norm="linf", eps=0.05))
            attack(counter, x.clone(), y, torch.arange(N) * 977, 5)
            shares[name] = counter.fooled.double().mean().item()
    assert any(0 < share < 1 for share in shares.values()), shares


@pytest.mark.parametrize("make", [AutoAttack, Square, Transfer])
def test_attacks_of_other_libraries_do_not_mix_devices(make: type[Any]) -> None:
    network = small_network(nn.ReLU).float().requires_grad_(False)
    x = some_images(4).float()
    y = network(x).argmax(1)
    attack: Attack
    if make is Transfer:
        attack = Transfer(source=None, attack=PGD(norm="linf", eps=0.1, steps=2))
        attack.connect(network)
    elif make is Square:
        attack = Square(norm="linf", eps=0.01, queries=5)
    else:
        attack = AutoAttack(norm="linf", eps=0.5)
    expected = attack(network, x.clone(), y, torch.arange(4))
    with claimed_gpu():
        there = network_on_gpu(copy.deepcopy(network))
        if isinstance(attack, Transfer):
            attack.connect(there)
        found = attack(there, on_gpu(x), on_gpu(y), on_gpu(torch.arange(4)))
    torch.testing.assert_close(values(found), expected)


@pytest.fixture
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast does not reach claimed tensors."""
    monkeypatch.setattr(hardware, "computes_in_bfloat16", lambda device: False)


INNER = PGD(norm="linf", eps=0.1, steps=2, keep_best=False)
METHODS: list[Training] = [
    NaturalTraining(epochs=1),
    PGDTraining(epochs=1, attack=INNER),
    PGDTraining(epochs=1, attack=INNER, search="fast"),
    FastTraining(epochs=1, attack=PGD(norm="linf", eps=0.1, steps=1, keep_best=False), probe=INNER),
    FreeTraining(epochs=1, replays=2, norm="linf", eps=0.1, probe=INNER),
    TRADESTraining(epochs=1, attack=PGD(norm="linf", eps=0.1, steps=2, loss="kl", keep_best=False)),
    MARTTraining(epochs=1, attack=INNER),
    ALPTraining(epochs=1, attack=INNER),
]


@pytest.mark.usefixtures("no_bfloat16")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_objectives_have_on_a_gpu_the_gradients_of_a_cpu(method: Training) -> None:
    x, y, keys = some_images().float(), torch.arange(N) % 10, torch.arange(N)
    here = small_network(partial(KWTA, 0.3)).float()
    there = network_on_gpu(copy.deepcopy(here))

    def gradients(network: nn.Module, batch: Batch) -> list[Any]:
        for loss, _ in method.losses(network.train(), batch, {}):
            network.zero_grad()
            loss.backward()
        robust = method.robustly_correct(network.eval(), batch)
        return [*(parameter.grad for parameter in network.parameters()), robust]

    expected = gradients(here, Batch(x, y, keys))
    with claimed_gpu():
        found = gradients(there, Batch(on_gpu(x), on_gpu(y), on_gpu(keys)))
    for one, other in zip(values(found), expected, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class StoppedError(Exception):
    """Raised in place of the end of the process."""


def evaluation(
    folder: Path, on_device: Callable[[Tensor], Tensor], network: nn.Module, **others: Any
) -> Evaluation:
    x = some_images(20).mul(255).round().to(torch.uint8)
    y = network(x.to(torch.float32) / 255).argmax(1) if on_device is not on_gpu else others.pop("labels")
    suite = {name: attacks("linf", 0.05)[name] for name in ("pgd", "apgd", "anneal", "es")}
    there = network_on_gpu(copy.deepcopy(network)) if on_device is on_gpu else network
    split = Split(on_device(x), on_device(y), on_device(torch.arange(20)))
    return Evaluation(there, split, suite, Threat(norm="linf", eps=0.05), folder, batch_size=6, **others)


@pytest.mark.usefixtures("no_bfloat16")
@pytest.mark.parametrize("search", ["exact", "fast"])
def test_an_evaluation_on_a_gpu_has_the_records_of_a_cpu(search: Any, tmp_path: Path) -> None:
    network = small_network(partial(KWTA, 0.3)).float()
    here = evaluation(tmp_path / "cpu", lambda tensor: tensor, network, search=search)
    expected = here.run()
    checked = diagnose(here, expected, checks_n=6)
    with claimed_gpu():
        there = evaluation(tmp_path / "gpu", on_gpu, network, search=search, labels=here.images.y)
        stopped = mock.Mock(side_effect=StoppedError)
        with mock.patch.object(EvolutionStrategies, "__call__", stopped), pytest.raises(StoppedError):
            there.run()
        found = there.run()  # continues
        checked_there = diagnose(there, found, checks_n=6)
    assert list(found.records) == list(expected.records)
    for name, record in expected.records.items():
        for column in ("index", "digest", "fooled", "queries", "steps"):
            assert np.array_equal(found.records[name].columns[column], record.columns[column]), (name, column)
    assert checked_there.measured == pytest.approx(checked.measured, abs=1e-6)


def claimed_once(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda else on_gpu(tensor)


def test_a_training_on_a_gpu_resumes_to_the_weights_of_a_cpu(tmp_path: Path) -> None:
    method = PGDTraining(epochs=2, batch_size=8, attack=INNER, ema_decay=0.9, clip_norm=1.0)
    x, y = some_images(24).mul(255).round().to(torch.uint8), torch.arange(24) % 10

    def train(on_device: Callable[[Tensor], Tensor], folder: str, stop_at: int | None) -> Trained:
        network = small_network(partial(KWTA, 0.3)).float()
        fabric = Runtime(accelerator="cpu").fabric()
        if on_device is on_gpu:
            network = network_on_gpu(network)
            fabric.to_device = partial(tree_map_only, Tensor, claimed_once)  # type: ignore[method-assign]
        split = Split(on_device(x), on_device(y), on_device(torch.arange(24)))
        recipe = Recipe(
            method,
            optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            lr_schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=2),
            sparsity=Constant(),
        )
        made = Trainer(network, recipe, TrainingBatches(split, 8, 1, True, seed=0), split, fabric)
        if stop_at is not None:
            original, calls = made._train_on, iter(range(100))

            def stopping(batch: Batch) -> None:
                if next(calls) == stop_at:
                    raise StoppedError
                original(batch)

            made._train_on = stopping  # type: ignore[method-assign]
        return made.train(tmp_path / folder, lambda _: None)

    expected = train(lambda tensor: tensor, "cpu", None)
    with (
        claimed_gpu(),
        mock.patch.object(Fabric, "device", DEVICE),
        mock.patch("lightning_fabric.fabric._update_properties"),
        mock.patch("lightning_fabric.strategies.SingleDeviceStrategy.module_to_device"),
        mock.patch("lightning_fabric.wrappers.move_data_to_device", lambda tree, _: tree),
    ):
        with pytest.raises(StoppedError):
            train(on_gpu, "gpu", 4)
        found = train(on_gpu, "gpu", None)
    assert [record["epoch"] for record in found.history] == [1, 2]
    for name, weight in values(found.last).items():
        torch.testing.assert_close(weight, expected.last[name], rtol=1e-4, atol=1e-5)


def test_an_operation_on_two_devices_is_refused() -> None:
    here = torch.ones(3)
    with claimed_gpu():
        there = on_gpu(here)
        for mixed in (
            lambda: there + here,
            lambda: torch.where(here > 0, there, there),
            lambda: here[there.long()],
        ):
            with pytest.raises(MixedDevicesError, match="one device"):
                mixed()
        assert values(there + torch.tensor(1.0)).tolist() == [2, 2, 2]  # as CUDA allows
        assert values(there[torch.tensor([0])]).tolist() == [1]
        assert torch.zeros(2, device="cuda").device == DEVICE


WAITING: list[Callable[[Tensor], object]] = [
    lambda x: x.sum().item(),
    lambda x: x[x > 0],
    lambda x: bool((x > 0).all()),
    lambda x: x.cpu(),
    lambda x: (x > 0).nonzero(),
    lambda x: torch.bincount(x.long()),
    lambda x: x.tolist(),
    lambda x: x.masked_select(x > 0),
]


@pytest.mark.parametrize("number", range(len(WAITING)))
def test_a_point_where_the_host_waits_is_counted(number: int) -> None:
    with claimed_gpu() as seen:
        WAITING[number](on_gpu(torch.ones(3)))
        assert seen.waits.total() >= 1


def test_work_that_stays_on_the_gpu_has_no_waits() -> None:
    with claimed_gpu() as seen:
        x, index = on_gpu(torch.arange(3.0)), on_gpu(torch.arange(3))
        torch.where(x > 1, x, 0).scatter_add_(0, index, x)
        x.index_copy_(0, index, 3 * x)
        x[index] = 2 * x
        assert values(x).tolist() == [0, 6, 12]
        assert seen.waits.total() == 0
        assert {"where", "gt", "scatter_add_", "index_copy_", "index_put_"} <= set(seen.operations)


def test_a_step_of_an_attack_waits_every_eighth_time_at_most() -> None:
    for name, (alone, counted) in claimed.attack_steps().items():
        waits = 1 if name.startswith("es") else 1 / 8  # es makes samples for the images that are left
        assert alone[1] <= waits, name
        assert counted[1] <= waits, name
        assert alone[0] <= OPERATIONS[name], name
        assert counted[0] - alone[0] <= COUNTING * (6 if name.startswith("smoothed") else 3), name


OPERATIONS = {
    "pgd": 70,
    "apgd": 92,
    "bpda": 90,
    "smoothed, 5 samples": 340,
    "es, 20 samples, an image": 122,
}
"""At most so many in a step, those of a network of seven layers included."""

COUNTING = 48
"""At most so many for each batch whose queries are counted."""


def test_adversarial_training_never_waits_within_a_step() -> None:
    inner, rest = claimed.training_steps()
    assert (inner[1], rest[1]) == (0, 0)
    assert inner[0] <= 30
    assert rest[0] <= 90
