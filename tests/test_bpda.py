"""BPDA: exact forward, relaxed backward, and stronger than plain PGD on winner-take-all networks."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kwta_exp.activations import KWTA, LWTA
from kwta_exp.attacks import BPDA, PGD, Attack, NotApplicableError, RelaxedTransfer, Threat
from kwta_exp.attacks.bpda import RELAXATIONS
from kwta_exp.attacks.relaxing.model import relaxed
from kwta_exp.models import MLP
from kwta_exp.randomness import fold, key

ACTIVATIONS = [KWTA(0.3), KWTA(k=3, by="magnitude"), KWTA(0.5, over="channel"), KWTA(0.2, relu=True), LWTA(2)]


def soft(module: nn.Module, x: Tensor, temperature: float) -> Tensor:
    """The relaxations as loops over rows and units."""
    if isinstance(module, LWTA):
        out = torch.zeros_like(x)
        deviation = x.flatten(1).std(1).detach()
        for n, c in ((n, c) for n in range(x.shape[0]) for c in range(x.shape[1])):
            rival = x[n, c ^ 1]  # the other of a group of two
            out[n, c] = x[n, c] * torch.sigmoid((x[n, c] - rival) / (temperature * deviation[n]))
        return out
    assert isinstance(module, KWTA)
    x = x.relu() if module.relu else x
    rows = x.flatten(0, 1).flatten(1) if module.over == "channel" else x.flatten(1)
    gated = []
    for row in rows:
        score = row.abs() if module.by == "magnitude" else row
        count = module.k or max(1, int(module.ratio * len(row)))  # type: ignore[operator]
        values, width = score.detach(), temperature * score.detach().std()
        threshold = values.sort(descending=True).values[count - 1]
        is_open = torch.sigmoid((values - threshold) / width)
        share = (
            is_open * (1 - is_open) / (is_open * (1 - is_open)).sum()
        )  # of each value in the threshold's move
        gated.append(row * torch.sigmoid((score - threshold - (share * (score - values)).sum()) / width))
    return torch.stack(gated).view_as(x)


@pytest.mark.parametrize("module", ACTIVATIONS, ids=repr)
def test_forward_is_exact_and_backward_is_the_relaxation(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(3, 4, 5, 2, dtype=torch.float64, generator=generator)

    with relaxed([(module, RELAXATIONS[type(module)])], 0.3):
        out = module(x)
        (found,) = torch.autograd.grad((out * weight).sum(), x)
    (expected,) = torch.autograd.grad((soft(module, x, 0.3) * weight).sum(), x)
    (plain,) = torch.autograd.grad((module(x) * weight).sum(), x)

    assert torch.equal(out, module(x))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, plain)


def test_a_relaxation_keeps_bfloat16() -> None:
    module, x = KWTA(0.3), torch.randn(2, 20, dtype=torch.bfloat16, requires_grad=True)
    with relaxed([(module, RELAXATIONS[KWTA])], 0.1, exact_forward=False):
        assert module(x).dtype == torch.bfloat16


def test_a_low_temperature_approaches_the_plain_gradient() -> None:
    module, x = KWTA(0.3), torch.randn(2, 50, dtype=torch.float64, requires_grad=True)
    with relaxed([(module, RELAXATIONS[KWTA])], 1e-9):
        (found,) = torch.autograd.grad(module(x).sum(), x)
    (plain,) = torch.autograd.grad(module(x).sum(), x)
    off_threshold = x != x.detach().sort(1, descending=True).values[:, 14:15]
    torch.testing.assert_close(found[off_threshold], plain[off_threshold])


def test_hooks_are_removed_after_the_attack_and_after_an_error() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), KWTA(0.5), nn.Linear(8, 3)).eval()
    x, y = torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.long)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for attack in (BPDA(norm="linf", eps=0.1, steps=2), RelaxedTransfer(norm="linf", eps=0.1, steps=2)):
        attack(model, x, y, torch.arange(4))
        with pytest.raises(RuntimeError):
            attack(model, x[:, :, :2], y, torch.arange(4))
    assert not model[2]._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_network_without_winner_take_all_layers_is_not_applicable(linear_model: nn.Module) -> None:
    x, y = torch.zeros(1, 3, 4, 4).double(), torch.zeros(1, dtype=torch.long)
    for attack in (BPDA(norm="linf", eps=0.1), RelaxedTransfer(norm="linf", eps=0.1)):
        with pytest.raises(NotApplicableError, match="no winner-take-all layer"):
            attack(linear_model, x, y, y)


class Halved(nn.Module):
    """A user's own discontinuous activation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > x.median(), x, x * 0)


def soft_halved(module: Halved, x: Tensor, temperature: float) -> Tensor:
    gate = torch.sigmoid((x - x.detach().median()) / temperature)
    return x * gate + 0 * module(x).detach()  # a relaxation may call the module


def test_a_user_can_give_a_relaxation_of_their_own_activation() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), Halved(), nn.Linear(8, 3)).eval()
    x, y = torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.long)
    with pytest.raises(NotApplicableError):
        BPDA(norm="linf", eps=0.1, operators=False)(model, x, y, torch.arange(4))
    attack = BPDA(norm="linf", eps=0.1, gates={f"{__name__}.Halved": f"{__name__}.soft_halved"})
    assert attack.details(model, x)["activations_replaced"] == 1
    assert Threat(norm="linf", eps=0.1).distance(attack(model, x, y, torch.arange(4)), x).max() <= 0.1 + 1e-6


def random_kwta_network(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A random k-WTA network in float64, images of noise, and its predictions."""
    torch.manual_seed(seed)
    facts = {"num_classes": 10, "in_channels": 1, "image_size": (8, 8)}
    model = MLP(partial(KWTA, ratio=0.1), hidden=[200, 200], **facts).double().eval().requires_grad_(False)
    x = torch.rand(60, 1, 8, 8).double()
    return model, x, model(x).argmax(1)


def test_bpda_fools_more_images_of_kwta_networks_than_plain_pgd() -> None:
    """With the same steps and restarts, over four networks in float64."""
    threat = Threat(norm="linf", eps=0.03)
    effort: Any = {"norm": "linf", "eps": 0.03, "steps": 20, "restarts": 2}
    attacks: dict[str, Attack] = {
        "plain": PGD(**effort),
        "pgd": BPDA(**effort, temperatures=[0.1, 0.05], ascent="pgd"),
        "apgd": BPDA(**effort, temperatures=[0.05], ascent="apgd"),
        "anneal": BPDA(**effort, temperatures=[0.1, 0.01], ascent="anneal"),
        "relaxed_transfer": RelaxedTransfer(**effort),
    }
    robust = dict.fromkeys(attacks, 0)
    for seed in range(4):
        model, x, y = random_kwta_network(seed)
        keys = fold(key(seed, "test"), torch.arange(len(x)))
        for name, attack in attacks.items():
            x_adv = attack(model, x, y, keys)
            assert threat.distance(x_adv, x).max() <= 0.03 + 1e-6
            robust[name] += int((model(x_adv).argmax(1) == y).sum())

    print(f"robust of 240 images: {robust}")
    assert 60 < robust["plain"] < 180
    assert max(robust["pgd"], robust["apgd"], robust["anneal"]) < 0.6 * robust["plain"]
    assert max(robust["apgd"], robust["anneal"]) < robust["pgd"]
    assert robust["relaxed_transfer"] < 0.4 * 240  # its images transfer


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_adversarial_images_stay_in_the_ball_and_in_range(norm: str) -> None:
    threat = Threat(norm=norm, eps=0.3)  # type: ignore[arg-type]
    torch.manual_seed(0)
    facts = {"num_classes": 4, "in_channels": 1, "image_size": (4, 4)}
    model = MLP(partial(LWTA, group_size=2), hidden=[16], **facts).eval()
    x = torch.rand(8, 1, 4, 4).round()  # at the edges of [0, 1]
    y = model(x).argmax(1)
    settings: Any = {"norm": norm, "eps": 0.3, "steps": 5, "restarts": 2}
    attacks = [BPDA(**settings, ascent=ascent) for ascent in ("anneal", "pgd", "apgd")]
    for attack in (*attacks, RelaxedTransfer(**settings)):
        x_adv = attack(model, x, y, torch.arange(8))
        assert threat.distance(x_adv, x).max() <= 0.3 + 1e-6
        assert 0 <= x_adv.min() <= x_adv.max() <= 1
        assert (model(x_adv).argmax(1) != y).any()


def test_a_step_size_is_accepted_with_ascent_pgd_only() -> None:
    BPDA(norm="linf", eps=0.1, step_size=0.01, ascent="pgd")
    with pytest.raises(ValueError, match="ascent=anneal sets its own; expected null"):
        BPDA(norm="linf", eps=0.1, step_size=0.01)
