"""Attacks call the model in micro-batches, whose size does not change results."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kwta_exp.activations import KWTA
from kwta_exp.attacks import (
    APGD,
    BPDA,
    PGD,
    Attack,
    EvolutionStrategies,
    RelaxedTransfer,
    SmoothedPGD,
    Threat,
)
from kwta_exp.attacks.base import MicroBatches, input_gradient
from kwta_exp.attacks.losses import cross_entropy
from kwta_exp.data.batches import Split
from kwta_exp.evaluation import Evaluation
from kwta_exp.evaluation.evaluation import BATCHES_IN_A_CHUNK
from tests.test_evaluation import InDouble


class Watched(nn.Module):
    """Records the size of each batch. Some images are fooled at once, some late, some never."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 30), activation, nn.Linear(30, 5)).double()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        logits: Tensor = self.layers(x.double())
        return logits


IMAGES = 24


@pytest.fixture
def images() -> tuple[Watched, Tensor, Tensor, Tensor]:
    return images_for(nn.Tanh())


def images_for(activation: nn.Module, n: int = IMAGES) -> tuple[Watched, Tensor, Tensor, Tensor]:
    model = Watched(activation).eval()
    x = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = model(x).argmax(1)
    model.sizes.clear()
    return model, x, y, torch.arange(n) * 7


EPS = 0.04
ATTACKS: dict[str, Any] = {
    "pgd": PGD(norm="linf", eps=EPS, steps=10),
    "l2, restarts": PGD(norm="l2", eps=4 * EPS, steps=5, restarts=3),
    "momentum, no random start": PGD(norm="linf", eps=EPS, steps=7, momentum=1.0, random_start=False),
    "targeted": PGD(norm="linf", eps=EPS, steps=5, targets=3, loss="margin"),
    "kl": PGD(norm="linf", eps=EPS, steps=5, loss="kl"),
    "last iterate": PGD(norm="linf", eps=EPS, steps=5, keep_best=False),
    "apgd": APGD(norm="linf", eps=EPS, steps=30, restarts=2),
    "apgd, targets": APGD(norm="l2", eps=4 * EPS, steps=20, targets=2, loss="dlr"),
    "apgd, kl": APGD(norm="linf", eps=EPS, steps=20, loss="kl"),
}


BPDAS: dict[str, Any] = {
    "bpda": BPDA(norm="linf", eps=EPS, steps=15, restarts=2),
    "bpda, l2": BPDA(norm="l2", eps=4 * EPS, steps=8, restarts=1, loss="ce"),
    "bpda, kl": BPDA(norm="linf", eps=EPS, steps=8, restarts=2, loss="kl"),
    "bpda, pgd": BPDA(norm="linf", eps=EPS, steps=8, restarts=3, ascent="pgd"),
    "bpda, apgd": BPDA(norm="linf", eps=EPS, steps=20, restarts=2, ascent="apgd"),
    "relaxed_transfer": RelaxedTransfer(norm="linf", eps=EPS, steps=8, restarts=3),
}


@pytest.mark.parametrize("max_batch_size", [1, 7, 1000])
@pytest.mark.parametrize("name", [*ATTACKS, *BPDAS])
def test_the_size_of_micro_batches_does_not_change_results(name: str, max_batch_size: int) -> None:
    model, x, y, keys = images_for(KWTA(0.3) if name in BPDAS else nn.Tanh())
    attack = (ATTACKS | BPDAS)[name]
    expected = attack(model, x, y, keys)
    queries = sum(model.sizes)
    assert max(model.sizes) == IMAGES
    fooled = model(expected).argmax(1) != y
    assert 0 < fooled.sum() < IMAGES or name == "last iterate"
    model.sizes.clear()

    found = attack(model, x, y, keys, max_batch_size=max_batch_size)

    assert max(model.sizes) <= max_batch_size
    assert sum(model.sizes) == queries  # no image costs more queries than it would alone
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_chunk_of_several_batches_needs_fewer_calls_of_the_model() -> None:
    """Fooled images drop out, and the micro-batches are filled with the rest."""
    attack = PGD(norm="linf", eps=2 * EPS, steps=40)
    model, x, y, keys = images_for(nn.Tanh(), 48)
    attack(model, x, y, keys, max_batch_size=12)
    in_chunk = list(model.sizes)
    model.sizes.clear()
    for some in torch.arange(len(x)).split(12):
        attack(model, x[some], y[some], keys[some])
    one_by_one = model.sizes

    assert sum(in_chunk) == sum(one_by_one)
    assert len(in_chunk) < 0.7 * len(one_by_one)


def test_micro_batches_are_halved_when_memory_runs_out() -> None:
    class Small(Watched):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 11:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    model = Small(nn.Tanh()).eval()
    x = torch.rand(50, 3, 4, 4, dtype=torch.float64)
    batches = MicroBatches(model, 40)
    torch.testing.assert_close(batches.logits(x), model.layers(x))
    assert model.sizes == [10] * 5  # not 40, not 20
    assert batches.logits(x[:0]).shape == (0, 5)
    y = model.layers(x).argmax(1)
    found, whole = (MicroBatches(each, 40).gradient(x, y, cross_entropy) for each in (model, model.layers))
    for part, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(part, expected)
    attack = EvolutionStrategies(norm="linf", eps=EPS, steps=2, samples=60, chunk=40)
    y = model.layers(x[:2]).argmax(1)
    found = attack(model, x[:2], y, torch.arange(2))
    torch.testing.assert_close(found, attack(Watched(nn.Tanh()).eval(), x[:2], y, torch.arange(2)))

    def always_fails(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        MicroBatches(always_fails, None).logits(x)


def test_an_evaluation_never_exceeds_its_batch_size(tmp_path: Path, cpu: str) -> None:
    """An attack receives a chunk of several batches. The outcomes do not depend on the batch size."""
    torch.manual_seed(1)
    network: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(48, 30), nn.Tanh(), nn.Linear(30, 5))
    exact = InDouble(copy.deepcopy(network))  # rounding decides no outcome
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (70, 3, 4, 4), generator=generator, dtype=torch.uint8)
    y = exact(x / 255).argmax(1)
    split = Split(x, y, torch.arange(70))
    sizes: list[int] = []
    for each in (network, exact):
        each.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    given: list[int] = []

    class Spy(PGD):
        def __call__(self, model: nn.Module, x: Tensor, *rest: Any, **more: Any) -> Tensor:
            given.append(len(x))
            return super().__call__(model, x, *rest, **more)

    suite: dict[str, Attack] = {
        "pgd": Spy(norm="linf", eps=EPS, steps=20),
        "smoothed": SmoothedPGD(norm="linf", eps=EPS, steps=3, samples=2),
    }
    threat = Threat(norm="linf", eps=EPS)
    outcomes = []
    for batch, fast in ((8, False), (8, True), (70, False)):
        folder = tmp_path / f"{batch} {fast}"
        sizes.clear()
        shown = network if fast else exact
        search: Any = "fast" if fast else "exact"
        outcome = Evaluation(shown, split, suite, threat, folder, batch_size=batch, search=search).run()
        assert max(sizes) <= batch
        outcomes.append(outcome.records["pgd"].columns["fooled"])
    assert given[0] == BATCHES_IN_A_CHUNK * 8
    assert 0.1 < outcomes[0].mean() < 0.9
    assert (outcomes[0] == outcomes[2]).all()


def test_input_gradient_leaves_no_gradients_on_weights() -> None:
    layer = nn.Linear(3, 2)
    gradient, _, value = input_gradient(layer, torch.ones(4, 3), torch.zeros(4), lambda z, y: z.sum(1))
    assert torch.allclose(gradient, layer.weight.sum(0).expand(4, 3))
    assert value.shape == (4,)
    assert layer.weight.grad is None
