"""Random numbers depend on key and position alone, and are uniform or normal."""

import math

import pytest
import torch
from torch import Tensor

from kwta_exp import randomness
from kwta_exp.randomness import fold, isolated, key, normal, permutation, uniform


def plain_uniform(keys_N: Tensor, size: int) -> Tensor:
    """SplitMix64 in Python's own integers."""
    drawn = []
    for start in keys_N.tolist():
        for place in range(1, size + 1):
            z = (start + place * 0x9E3779B97F4A7C15) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            drawn.append((z ^ (z >> 31)) >> 40)
    return (torch.tensor(drawn, dtype=torch.float64) / 2**24).float().view(len(keys_N), size)


def plain_normal(keys_N: Tensor, size: int) -> Tensor:
    u = plain_uniform(keys_N, 2 * size).view(len(keys_N), 2, size)
    return torch.sqrt(-2 * torch.log1p(-u[:, 0])) * torch.cos(2 * math.pi * u[:, 1])


@pytest.mark.parametrize("many", [0, 1 << 62], ids=["kernel", "torch"])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_bit_is_that_of_splitmix64(many: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "MANY", many)
    if many:
        monkeypatch.delitem(randomness.sys.modules, "numba", raising=False)
    torch.set_num_threads(threads)
    ends = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), key(0, "a"), -5])
    for keys in (ends, ends[::2], ends[:1], ends[:0], fold(key(1), torch.arange(40))):
        for size in (0, 1, 2, 7, 64, 301):
            assert torch.equal(uniform(keys, (size,)), plain_uniform(keys, size))
        assert torch.equal(normal(keys, (35,)), plain_normal(keys, 35))
    assert uniform(ends, (3, 4)).shape == (7, 3, 4)


def test_keys_differ_by_seed_and_purpose_and_are_pinned() -> None:
    # A change here would change every seeded result.
    assert key(0, "order", 1) == 4489457307835839548
    pinned = uniform(torch.tensor([key(0, "a"), -5]), (2,))
    assert pinned.flatten().tolist() == [
        0.3060547113418579,
        0.3127847909927368,
        0.0886504054069519,
        0.5575479865074158,
    ]
    assert len({key(0, "a"), key(1, "a"), key(0, "b"), key(0, "a", 0), key(0, "a", 1)}) == 5


def test_batch_composition_does_not_change_what_an_image_draws() -> None:
    keys = fold(key(3, "noise"), torch.arange(100))
    together = uniform(keys, (3, 5))
    alone = torch.cat([uniform(k[None], (3, 5)) for k in keys])
    assert torch.equal(together, alone)
    order = torch.randperm(100)
    assert torch.equal(uniform(keys[order], (3, 5)), together[order])


def test_uniform_is_uniform() -> None:
    u = uniform(fold(key(0, "test"), torch.arange(1000)), (200,))
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    # 200,000 draws: each of 20 bins holds 10,000 +- 97; the tolerance is six standard deviations.
    counts = torch.histc(u, 20, 0, 1)
    assert (counts - 10_000).abs().max() < 6 * 97
    # Neighbouring streams and neighbouring positions are uncorrelated (standard error 0.0022).
    v = u - 0.5
    for a, b in ((v[:, 1:], v[:, :-1]), (v[1:], v[:-1])):
        assert abs((a * b).mean() / v.var()) < 0.0022 * 6


def test_normal_is_normal() -> None:
    z = normal(fold(key(0, "test"), torch.arange(1000)), (100,)).flatten().double()
    assert abs(z.mean()) < 6 / 100_000**0.5
    assert abs(z.var() - 1) < 6 * (2 / 100_000) ** 0.5
    assert abs((z**4).mean() - 3) < 6 * (96 / 100_000) ** 0.5
    assert z.isfinite().all()


def test_a_permutation_has_every_index_and_depends_on_its_key() -> None:
    assert permutation(50, 7).sort().values.tolist() == list(range(50))
    assert torch.equal(permutation(50, 7), permutation(50, 7))
    assert not torch.equal(permutation(50, 7), permutation(50, 8))


def test_isolation_touches_no_gpu_before_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*args: object, **kwargs: object) -> object:
        raise AssertionError("CUDA was touched")

    for name in dir(torch.cuda):
        if callable(getattr(torch.cuda, name)) and not name.startswith("_") and name != "is_initialized":
            monkeypatch.setattr(torch.cuda, name, touched)
    monkeypatch.setattr(torch.cuda, "_lazy_call", touched)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    before = torch.get_rng_state()
    with isolated(5):
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_isolation_seeds_and_restores_the_gpus_in_use_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight, the current one and one with a context."""
    generators = [torch.Generator().manual_seed(100 + gpu) for gpu in range(8)]
    read, written = [], []

    def state(gpu: int) -> torch.Tensor:
        read.append(gpu)
        return generators[gpu].get_state()

    def restore(value: torch.Tensor, gpu: int) -> None:
        written.append(gpu)
        generators[gpu].set_state(value)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda gpu: gpu == 5, raising=False)
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "get_rng_state", state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", restore)
    before = [each.get_state() for each in generators]
    with isolated(5):
        assert [each.initial_seed() for each in generators] == [100, 101, 5, 103, 104, 5, 106, 107]
        torch.rand(3, generator=generators[2])
    assert all(map(torch.equal, before, [each.get_state() for each in generators]))
    assert (read, written) == ([2, 5], [2, 5])
