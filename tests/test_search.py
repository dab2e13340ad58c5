"""The proxy that attacks may search on equals the network up to rounding; the network itself judges."""

import copy
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kwta_exp import hardware
from kwta_exp.activations import KWTA
from kwta_exp.attacks import BPDA, PGD, Attack, Threat
from kwta_exp.data.batches import Split
from kwta_exp.data.datasets import Digits
from kwta_exp.evaluation import Evaluation
from kwta_exp.models import CNN, DenseNet, ResNet, WideResNet
from kwta_exp.models.proxy import (
    Proxy,
    keep_bfloat16_copies,
    proxy_for,
    updated_proxy,
    with_folded_batch_norms,
)
from kwta_exp.training import PGDTraining
from tests.test_evaluation import InDouble
from tests.test_training import INNER, KillAfter, KilledError, train

KWTA_01 = partial(KWTA, ratio=0.1)
THREAT = Threat(norm="linf", eps=0.1)


def trained_statistics(network: nn.Module, x: Tensor) -> nn.Module:
    """Batch norms that are not the identity."""
    with torch.no_grad():
        for norm in [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
            norm.momentum = 0.5
        network.train()
        for _ in range(3):
            network(x)
    return network.eval()


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """The relative error of each image's logits."""
    return (found - expected).norm(dim=1) / expected.norm(dim=1)


def batch_norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize(
    ("make", "remaining"),
    [
        (partial(ResNet, KWTA_01, width=8), 0),
        (partial(ResNet, nn.ReLU, width=8, depth=50), 0),
        (
            partial(WideResNet, KWTA_01, depth=10, widen_factor=1),
            4,
        ),  # pre-activation: half of them follow no convolution
        (partial(DenseNet, KWTA_01, growth=4), None),
    ],
)
def test_a_proxy_equals_the_network_up_to_rounding(make: Any, remaining: int | None, cpu: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(6, 3, 16, 16)
    network = trained_statistics(make(num_classes=10, in_channels=3), x)
    before = copy.deepcopy(network.state_dict())

    fast = Proxy(network, x[:2])

    assert batch_norms(fast) < batch_norms(network)
    assert remaining is None or batch_norms(fast) == remaining
    activations = [type(module) for module in network.modules() if isinstance(module, KWTA)]
    assert [type(module) for module in fast.modules() if isinstance(module, KWTA)] == activations
    expected = network.double()(x.double())
    torch.testing.assert_close(fast.double().network(x.double()), expected, rtol=1e-5, atol=1e-5)
    assert all(
        torch.equal(before[name], tensor.to(before[name])) for name, tensor in network.state_dict().items()
    )
    assert not {id(p) for p in fast.parameters()} & {id(p) for p in network.parameters()}


@pytest.mark.parametrize("skips_zeros", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        partial(ResNet, width=64),
        partial(WideResNet, depth=10, widen_factor=4, dropout=0.2),
        partial(DenseNet, growth=16),
        lambda *_, **__: Branching(),
    ],
)
def test_a_proxy_is_updated_with_weights_statistics_and_ratios(
    make: Any, skips_zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 rounding changes a few winners, so most images are compared."""
    monkeypatch.setattr(hardware, "computes_in_bfloat16", lambda device: False)
    monkeypatch.setattr(hardware, "has_matrix_units", lambda device: not skips_zeros)
    torch.manual_seed(0)
    network = make(KWTA_01, num_classes=10, in_channels=1).eval()
    x = torch.rand(9, 1, 8, 8)
    first = updated_proxy(network, x[:2])
    logits = []
    for ratio in (0.1, 0.1, 0.15):
        for module in network.modules():
            if isinstance(module, KWTA):
                module.ratio = ratio
        with torch.no_grad():
            for tensor in network.parameters():
                tensor.mul_(torch.empty_like(tensor).uniform_(0.8, 1.2))
        trained_statistics(network, x)
        modes = [module.training for module in network.modules()]
        fast = updated_proxy(network, x[:2])
        logits.append(fast(x))
        assert relative_error(logits[-1], network(x)).median() < 1e-3
        kwta = any(isinstance(module, KWTA) for module in network.modules())
        assert (fast is first) == (ratio == 0.1 or not kwta)  # another ratio needs another proxy
        assert modes == [module.training for module in network.modules()]
        assert all(p.requires_grad for p in network.parameters())
    assert relative_error(logits[0], logits[1]).median() > 1e-2


def test_an_updated_proxy_equals_a_new_one_bit_for_bit(cpu: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(6, 1, 8, 8)
    network = trained_statistics(ResNet(KWTA_01, num_classes=10, in_channels=1, width=16), x)
    used = updated_proxy(network, x[:2])
    trained_statistics(network, x)
    again = updated_proxy(network, x[:2])(x)
    fresh = updated_proxy(copy.deepcopy(network), x[3:4])
    assert fresh is not used
    assert torch.equal(fresh(x), again)


def test_an_inner_attack_searches_on_a_proxy_of_the_current_weights(tmp_path: Path, cpu: str) -> None:
    """A training that is killed and continued gives the same weights bit for bit."""
    received: list[Tensor] = []

    def attack(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        assert isinstance(model, Proxy)
        assert not model.training
        current = network.get_parameter("7.weight")
        assert torch.equal(model.network.get_parameter("7.weight"), current)
        received.append(current.detach().clone())
        return INNER(model, x, y, keys)

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 64, 3, stride=2), nn.BatchNorm2d(64), KWTA_01(),
            nn.Conv2d(64, 64, 3, stride=2), nn.BatchNorm2d(64), KWTA_01(), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip

    training = PGDTraining(epochs=2, batch_size=400, attack=attack, search="fast")
    network = made()
    whole = train(tmp_path / "whole.pt", training, model=network)
    assert len(received) == 2 * (4 + 1)  # steps, and the validation images
    assert len({weight.norm().item() for weight in received}) == 1 + 2 * 4

    network = made()
    with pytest.raises(KilledError):
        train(tmp_path / "pieces.pt", training, KillAfter(7), 0.0, model=network)
    network = made()
    pieces = train(tmp_path / "pieces.pt", training, model=network)
    assert all(torch.equal(whole.last[name], pieces.last[name]) for name in whole.last)


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 10, 8), nn.BatchNorm2d(10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.convolution(x))
        return out.flatten(1) if out.sum() < 1e9 else out.flatten(1) * 2


class Shared(nn.Module):
    """One convolution feeds two batch norms; the output of the other is also used without its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = nn.Conv2d(1, 10, 3, padding=1), nn.Conv2d(10, 10, 8)
        self.a, self.b, self.c = nn.BatchNorm2d(10), nn.BatchNorm2d(10), nn.BatchNorm2d(10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.once(F.relu(self.a(self.twice(x))) + self.b(self.twice(x)))
        logits: Tensor = (self.c(out) + out).flatten(1)
        return logits


def test_batch_norms_that_cannot_be_folded_are_kept(cpu: str) -> None:
    x = torch.rand(4, 1, 8, 8)
    for network in (Branching(), Shared()):
        trained_statistics(network, x)
        fast = Proxy(network, x)
        assert batch_norms(fast) == batch_norms(network)
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu != "plain"):
            expected = network.to(memory_format=torch.channels_last)(
                x.contiguous(memory_format=torch.channels_last)
            )
        torch.testing.assert_close(fast(x), expected.float(), rtol=1e-3, atol=1e-3)
    assert with_folded_batch_norms(Branching().eval(), x) is None


def digits(n: int) -> Split:
    images = Digits().load()
    x, y = (torch.from_numpy(np.concatenate(parts)) for parts in (
        (images.x_test, images.x_train), (images.y_test, images.y_train)))  # fmt: skip
    return Split(x[:n], y[:n].long(), torch.arange(n))


def random_in_double(seed: int = 0) -> nn.Module:
    """A random network that computes in float64, so that rounding decides no outcome."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 10))
    return InDouble(layers).eval().requires_grad_(False)


def labelled_by(network: nn.Module, n: int) -> Split:
    """Digits with the network's predictions as labels."""
    images = digits(n)
    return Split(images.x, network(images.x / 255).argmax(1), images.index)


class AlwaysWrong(nn.Module):
    """A proxy that misclassifies every image, so that every search on it ends at once."""

    def __init__(self, network: nn.Module, sample: Tensor) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return -logits


def test_a_success_on_the_proxy_alone_does_not_end_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = random_in_double()
    images = labelled_by(network, 60)
    suite = {"pgd": PGD(norm="linf", eps=0.03, steps=20)}
    exact = Evaluation(network, images, suite, THREAT, tmp_path / "exact", batch_size=30).run().records
    monkeypatch.setattr("kwta_exp.evaluation.chunks.proxy_for", AlwaysWrong)

    fast = (
        Evaluation(network, images, suite, THREAT, tmp_path / "fast", batch_size=30, search="fast")
        .run()
        .records
    )

    fooled = exact["pgd"].columns["fooled"]
    assert 0.1 < fooled.mean() < 0.9
    assert np.array_equal(fast["pgd"].columns["fooled"], fooled)
    assert fast["pgd"].forwards > exact["pgd"].forwards  # the passes of the failed search count


class WrongOnWholeChunks(nn.Module):
    """Misclassifies a whole chunk, but not a part of it."""

    def __init__(self, network: nn.Module, sample: Tensor) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return -logits if len(x) == 30 else logits


def test_an_error_seen_during_the_search_is_confirmed_on_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = random_in_double()
    images = labelled_by(network, 30)
    suite = {"square": StopsAtAnError(norm="linf", eps=0.03), "pgd": PGD(norm="linf", eps=0.03, steps=10)}
    exact = Evaluation(network, images, suite, THREAT, tmp_path / "exact", batch_size=30).run().records
    monkeypatch.setattr("kwta_exp.evaluation.chunks.proxy_for", WrongOnWholeChunks)
    fast = (
        Evaluation(network, images, suite, THREAT, tmp_path / "fast", batch_size=30, search="fast")
        .run()
        .records
    )
    for name in suite:
        assert np.array_equal(fast[name].columns["fooled"], exact[name].columns["fooled"])
    again = ~fast["square"].columns["fooled"]
    assert (fast["square"].columns["queries"][again] > exact["square"].columns["queries"][again]).all()


class StopsAtAnError(PGD):
    """Stops when it sees an error, and returns the clean images."""

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        with torch.no_grad():
            if (model(x).argmax(1) != y).any():
                return x
        return PGD(norm="linf", eps=0.03, steps=5)(model, x, y, keys)


class Flattening(nn.Module):
    """Calls ``view``, which needs channels-first memory, and fails on an empty batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), KWTA(ratio=0.1))
        self.more, self.head = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.more(self.body(x))
        logits: Tensor = self.head(h.view(h.size(0), -1))
        return logits


class Float32Only(Flattening):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        h = self.body(x)
        assert h.dtype == torch.float32
        logits: Tensor = self.head(self.more(h).flatten(1))
        return logits


class Unique(Flattening):
    """Cannot be copied."""

    def __deepcopy__(self, memo: object) -> Self:
        raise TypeError("there can be only one")


def test_a_network_without_a_proxy_is_attacked_exactly(tmp_path: Path, cpu: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(3, 1, 8, 8)
    viewed = proxy_for(Flattening().eval(), x)
    assert isinstance(viewed, Proxy)
    assert viewed._layout == torch.contiguous_format

    normed, unique = Flattening().eval(), Unique().eval()
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(normed.more)
    for number, network in enumerate((Flattening().eval(), Float32Only().eval(), normed, unique)):
        for eps in (0.05, 1.0):  # at 1, every image of a chunk is fooled
            threat = Threat(norm="linf", eps=eps)
            evaluation = Evaluation(
                network, digits(200), {"pgd": PGD(norm="linf", eps=eps, steps=5)}, threat,
                tmp_path / f"{number} {eps}", batch_size=20, search="fast",
            )  # fmt: skip
            assert len(evaluation.run().records["pgd"]) > 5
        assert updated_proxy(network, x)(x).shape == (3, 10)
    assert updated_proxy(unique, x) is unique
    float32_only = Float32Only().eval()
    assert (updated_proxy(float32_only, x) is float32_only) == (cpu != "plain")


class Inner(nn.Module):
    """An activation that contains a module."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(x) - 0.1 * self.relu(-x)
        return out


def test_an_activation_that_contains_modules_is_kept_whole() -> None:
    torch.manual_seed(0)
    network = ResNet(Inner, num_classes=10, in_channels=1, width=8).eval()
    fast = Proxy(network, torch.rand(2, 1, 8, 8))
    count = sum(isinstance(module, Inner) for module in network.modules())
    assert sum(isinstance(module, Inner) for module in fast.modules()) == count
    assert batch_norms(fast) == 0


def trained(activation: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    images = Digits().load()
    x, y = torch.from_numpy(images.x_train) / 255, torch.from_numpy(images.y_train).long()
    network = CNN(
        activation, channels=[32, 32, 64, 64], hidden=100, num_classes=10, in_channels=1, image_size=(8, 8)
    )
    network(x[:1])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(12):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(x[index]), y[index]).backward()
            optimizer.step()
    return network.eval()


@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.ReLU, KWTA_01])
def test_the_fast_search_is_as_strong_as_the_exact_one(activation: Any, tmp_path: Path) -> None:
    """Robust accuracy rises by at most two points, over three networks with 500 images each.

    Rounding decides some images, in both directions.
    """
    images, threat = digits(500), Threat(norm="linf", eps=0.08)
    suite: dict[str, Attack] = {"pgd": PGD(norm="linf", eps=0.08, steps=20)}
    if activation is KWTA_01:
        suite["bpda"] = BPDA(norm="linf", eps=0.08, steps=20, restarts=2)
    robust = {(name, fast): 0.0 for name in suite for fast in (False, True)}
    for seed in range(3):
        network = trained(activation, seed)
        for fast in (False, True):
            folder = tmp_path / f"{seed} {fast}"
            search: Any = "fast" if fast else "exact"
            outcome = Evaluation(network, images, suite, threat, folder, search=search).run()
            for name, record in outcome.records.items():
                robust[name, fast] += (1 - record.columns["fooled"].mean()) / 3
    print(robust)
    for name in suite:
        assert 0.2 <= robust[name, False] <= 0.8
        assert robust[name, True] <= robust[name, False] + 0.02


class Casts(TorchDispatchMode):
    """Counts the casts of each tensor's shape to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_cast = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if is_cast and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [partial(ResNet, width=8), partial(DenseNet, growth=4), Branching])
def test_a_proxy_casts_no_weights_in_a_forward_and_computes_what_autocast_does(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "computes_in_bfloat16", lambda device: True)
    monkeypatch.setattr(hardware, "has_matrix_units", lambda device: True)
    torch.manual_seed(0)
    x = torch.rand(3, 1, 8, 8)
    network = make() if make is Branching else make(KWTA_01, num_classes=10, in_channels=1)
    trained_statistics(network, x)
    found, casts = {}, {}
    for kept in (True, False):
        with monkeypatch.context() as patch:
            if not kept:
                patch.setattr("kwta_exp.models.proxy.keep_bfloat16_copies", lambda network: [])
            fast = Proxy(network, x)
        fast.follow(network)
        image = x.clone().requires_grad_()
        with Casts() as counted:
            logits = fast(image)
        (gradient,) = torch.autograd.grad(logits.square().sum(), image)
        found[kept] = logits.detach(), gradient
        weights = {tensor.shape for tensor in fast.parameters() if tensor.dim() != 1}
        casts[kept] = sum(shape in weights for shape in counted.shapes)
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in network.modules())
    assert casts == {True: 0, False: layers}
    for one, other in zip(found[True], found[False], strict=True):
        assert torch.equal(one, other)


def test_the_bfloat16_copies_of_a_proxy_follow_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "computes_in_bfloat16", lambda device: True)
    monkeypatch.setattr(hardware, "has_matrix_units", lambda device: True)
    torch.manual_seed(0)
    x = torch.rand(3, 1, 8, 8)
    network = trained_statistics(ResNet(KWTA_01, num_classes=10, in_channels=1, width=8), x)
    fast = updated_proxy(network, x)
    before = fast(x)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.mul_(1.5)
    assert updated_proxy(network, x) is fast
    assert not torch.equal(fast(x), before)
    assert torch.equal(fast(x), updated_proxy(copy.deepcopy(network), x)(x))


def test_layers_whose_weights_are_computed_are_left_to_autocast() -> None:
    normed = nn.Linear(4, 3)
    torch.nn.utils.parametrizations.weight_norm(normed)
    old = nn.Linear(4, 3)
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(old)

    class Own(nn.Linear):
        pass

    layers = nn.Sequential(normed, old, Own(4, 3), nn.Linear(4, 3, bias=False))
    assert [tensor.shape for tensor, _ in keep_bfloat16_copies(layers)] == [(3, 4)]
    x = torch.rand(2, 4)
    assert torch.equal(layers[3](x), nn.functional.linear(x, layers[3].weight))  # outside autocast
