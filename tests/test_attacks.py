"""Attacks stay in the ball, have no side effects, and reach the closed-form optimum on a linear model."""

import math
from collections.abc import Callable
from typing import Any

import foolbox
import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from kwta_exp.activations import KWTA
from kwta_exp.attacks import (
    APGD,
    BPDA,
    NES,
    PGD,
    Attack,
    AutoAttack,
    EvolutionStrategies,
    FoolboxAttack,
    NotApplicableError,
    RelaxedTransfer,
    SmoothedPGD,
    Square,
    Threat,
    Transfer,
)
from kwta_exp.attacks.base import MicroBatches
from kwta_exp.attacks.losses import LOSSES, LossName, dlr, margin, ranking_margin, targeted_dlr
from kwta_exp.attacks.pgd import Best
from kwta_exp.attacks.threat import check_radius
from kwta_exp.evaluation.judge import misclassified
from kwta_exp.evaluation.query_counter import QueryCounter
from kwta_exp.fields import Norm
from kwta_exp.randomness import fold, key

THREATS = [Threat(norm="linf", eps=0.1), Threat(norm="l2", eps=0.6)]

NOISE = {
    "linf": foolbox.attacks.LinfRepeatedAdditiveUniformNoiseAttack,
    "l2": foolbox.attacks.L2RepeatedAdditiveGaussianNoiseAttack,
}

DEEPFOOL = {"linf": foolbox.attacks.LinfDeepFoolAttack, "l2": foolbox.attacks.L2DeepFoolAttack}


class ToDouble(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def transferred(attack: Attack) -> Transfer:
    """A transfer attack whose source is a copy of the linear model."""
    from tests.conftest import random_linear_model

    transfer = Transfer(source="elsewhere", attack=attack)
    transfer.connect(nn.Sequential(ToDouble(), random_linear_model()))
    return transfer


MAKERS: dict[str, Callable[[Threat], Attack]] = {
    "fgsm": lambda t: PGD(norm=t.norm, eps=t.eps, steps=1, step_size=t.eps, random_start=False),
    "pgd": lambda t: PGD(norm=t.norm, eps=t.eps, steps=20),
    "pgd_last": lambda t: PGD(norm=t.norm, eps=t.eps, steps=20, keep_best=False),
    "pgd_margin": lambda t: PGD(norm=t.norm, eps=t.eps, steps=20, loss="margin", restarts=2),
    "pgd_dlr": lambda t: PGD(norm=t.norm, eps=t.eps, steps=20, loss="dlr"),
    "mim": lambda t: PGD(
        norm=t.norm, eps=t.eps, steps=10, relative_step_size=1.0, random_start=False, momentum=1.0
    ),
    "pgd_t": lambda t: PGD(norm=t.norm, eps=t.eps, steps=20, targets=4),
    "pgd_t_margin": lambda t: PGD(norm=t.norm, eps=t.eps, steps=20, targets=4, loss="margin"),
    "apgd_dlr": lambda t: APGD(norm=t.norm, eps=t.eps, steps=20, loss="dlr"),
    "apgd": lambda t: APGD(norm=t.norm, eps=t.eps, steps=20),
    "apgd_t": lambda t: APGD(norm=t.norm, eps=t.eps, steps=20, targets=9),
    "smoothed": lambda t: SmoothedPGD(norm=t.norm, eps=t.eps, steps=10, samples=3),
    "autoattack": lambda t: AutoAttack(norm=t.norm, eps=t.eps, steps=10, queries=20),
    "square": lambda t: Square(norm=t.norm, eps=t.eps, queries=300),
    "es": lambda t: EvolutionStrategies(norm=t.norm, eps=t.eps, steps=20, samples=100, step_size=t.eps / 5),
    "transfer": lambda t: transferred(PGD(norm=t.norm, eps=t.eps, steps=20)),
    "cw": lambda t: FoolboxAttack(foolbox.attacks.L2CarliniWagnerAttack(2, steps=30, stepsize=0.05), t),
    "ddn": lambda t: FoolboxAttack(foolbox.attacks.DDNAttack(steps=30), t),
    "ead": lambda t: FoolboxAttack(foolbox.attacks.EADAttack(2, steps=30, initial_stepsize=0.05), t),
    "boundary": lambda t: FoolboxAttack(foolbox.attacks.BoundaryAttack(steps=300, source_step=0.1), t),
    "hopskipjump": lambda t: FoolboxAttack(
        foolbox.attacks.HopSkipJumpAttack(steps=8, max_gradient_eval_steps=200, constraint=t.norm), t
    ),
    "deepfool": lambda t: FoolboxAttack(DEEPFOOL[t.norm](steps=20), t),
    "noise": lambda t: FoolboxAttack(NOISE[t.norm](repeats=100), t),
}  # fmt: skip


@pytest.fixture
def images() -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels (all 0) and keys. The pixels lie so far inside [0, 1] that balls are not clipped."""
    x = 0.4 + 0.2 * torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    return x.double(), torch.zeros(24, dtype=torch.long), fold(key(0, "test"), torch.arange(24))


def constant_step_pgd(threat: Threat, **settings: Any) -> PGD:
    return PGD(norm=threat.norm, eps=threat.eps, steps=60, step_size=threat.eps / 2, **settings)


GRADIENT: dict[str, Callable[[Threat], Attack]] = {
    "fgsm": MAKERS["fgsm"],
    "mim": MAKERS["mim"],
    "pgd": lambda t: constant_step_pgd(t),
    "pgd_margin": lambda t: constant_step_pgd(t, loss="margin"),
    "pgd_last": lambda t: constant_step_pgd(t, keep_best=False),
    "pgd_restarts": lambda t: constant_step_pgd(t, restarts=2),
    "pgd_t": lambda t: constant_step_pgd(t, targets=1),
    "pgd_t_margin": lambda t: constant_step_pgd(t, targets=1, loss="margin"),
    "apgd": lambda t: APGD(norm=t.norm, eps=t.eps, steps=20),
    "apgd_margin": lambda t: APGD(norm=t.norm, eps=t.eps, steps=20, loss="margin"),
    "smoothed": lambda t: SmoothedPGD(norm=t.norm, eps=t.eps, steps=40, samples=3, relative_step_size=20.0),
}


def far_from_error(w: Tensor, others: tuple[float, ...] = ()) -> nn.Module:
    """Class 0 leads by 2 (w.(x - 1/2) + 5), too much for these balls, so that no attack stops early."""
    rows = torch.stack([w, -w, *(0 * w for _ in others)])
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, len(rows))).double()
    with torch.no_grad():
        model[1].weight.copy_(rows)
        model[1].bias.copy_(torch.tensor([5.0, -5.0, *others]) - rows.sum(1) / 2)
    return model


def assert_optimal(x_adv: Tensor, x: Tensor, w: Tensor, threat: Threat) -> None:
    """Inside the ball w.x decreases by at most eps times the dual norm of w."""
    dual = w.abs().sum() if threat.norm == "linf" else w.norm()
    gained = (x - x_adv).flatten(1) @ w
    torch.testing.assert_close(gained, (threat.eps * dual).expand(24), rtol=1e-3, atol=0)


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.norm)
@pytest.mark.parametrize("name", GRADIENT)
def test_gradient_attacks_reach_the_optimum_of_a_two_class_linear_model(name, threat, images) -> None:  # type: ignore[no-untyped-def]
    x, _, keys = images
    w = torch.randn(48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y = torch.zeros(24, dtype=torch.long)
    assert_optimal(GRADIENT[name](threat)(far_from_error(w), x, y, keys), x, w, threat)


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.norm)
@pytest.mark.parametrize("loss", ["dlr", "targeted dlr"])
def test_dlr_attacks_reach_the_optimum_of_a_linear_model(loss, threat, images) -> None:  # type: ignore[no-untyped-def]
    """As above, with two more classes of very small logits, which these losses need."""
    x, _, keys = images
    w = torch.randn(48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    model, y = far_from_error(w, (-90.0, -95.0)), torch.zeros(24, dtype=torch.long)
    targets = int(loss != "dlr")
    apgd = APGD(norm=threat.norm, eps=threat.eps, steps=20, loss="dlr", targets=targets)
    for attack in (apgd, constant_step_pgd(threat, loss="dlr", targets=targets)):
        assert_optimal(attack(model, x, y, keys), x, w, threat)


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.norm)
@pytest.mark.parametrize("name", MAKERS)
def test_attacks_break_a_linear_model_inside_the_ball(name, threat, images, linear_model) -> None:  # type: ignore[no-untyped-def]
    x, _, keys = images
    if name in ("square", "autoattack") and threat.norm == "l2":
        x = x.repeat(1, 1, 2, 1)  # the library's tiles do not fit into 4x4, those of a height of 8 do
        linear_model = nn.Sequential(nn.AvgPool2d((2, 1)), linear_model)
        threat = Threat(norm="l2", eps=1.2)
    if name == "noise":  # undirected, it needs a larger ball
        threat = Threat(norm=threat.norm, eps=5 * threat.eps)
    if name in ("autoattack", "square"):  # the library computes in float32
        x, linear_model = x.float(), linear_model.float()
    y = linear_model(x).argmax(1)
    x_adv = MAKERS[name](threat)(linear_model, x, y, keys)
    assert x_adv.shape == x.shape
    assert threat.distance(x_adv, x).max() <= threat.eps + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    # Most images have an adversarial example in these balls, and no clean image is one.
    assert (linear_model(x_adv).argmax(1) != y).double().mean() > 0.5


@pytest.mark.parametrize("name", MAKERS)
def test_attacks_restore_the_model_and_the_generators(name, images) -> None:  # type: ignore[no-untyped-def]
    x, y, keys = images
    x = x.float()
    torch.manual_seed(len(name))
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), KWTA(0.2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 5)
    ).eval()
    attack = MAKERS[name](THREATS[0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, rng, given = [m.training for m in model.modules()], torch.get_rng_state(), x.clone()

    attack(model, x, y, keys)

    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, given)


@pytest.mark.parametrize("height", range(3, 35))
def test_l2_square_is_not_applicable_exactly_where_the_library_fails(height: int) -> None:
    """So that a long evaluation does not fail midway, and no other image size is refused."""
    for width in {height, 32}:
        x = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(height))
        model = nn.Sequential(nn.Flatten(), nn.Linear(height * width, 3)).requires_grad_(False)
        y, keys = model(x).argmax(1), torch.arange(1)
        search = SquareAttack(
            model, norm="L2", eps=1e-4, n_queries=2, seed=0, device="cpu", resc_schedule=False
        )
        attack = Square(norm="l2", eps=1e-4, queries=2)
        try:
            search.perturb(x.clone(), y)
        except (RuntimeError, ZeroDivisionError):
            for refused in (attack, AutoAttack(norm="l2", eps=1e-4, steps=2, queries=2)):
                with pytest.raises(NotApplicableError, match=f"{height}x{width}"):
                    refused(model, x, y, keys)
        else:
            assert attack(model, x, y, keys).shape == x.shape


def test_black_and_white_images_stay_in_range(linear_model) -> None:  # type: ignore[no-untyped-def]
    x, linear_model = torch.cat([torch.zeros(4, 3, 4, 4), torch.ones(4, 3, 4, 4)]), linear_model.float()
    y = linear_model(x).argmax(1)
    for threat in THREATS:
        for name, make in MAKERS.items():
            if name in ("square", "autoattack") and threat.norm == "l2":
                continue  # not applicable to 4x4 images
            x_adv = make(threat)(linear_model, x, y, torch.arange(8))
            assert 0 <= x_adv.min() <= x_adv.max() <= 1, name
            assert threat.distance(x_adv, x).max() <= threat.eps + 1e-6


def test_batch_composition_does_not_change_outcomes(images, linear_model) -> None:  # type: ignore[no-untyped-def]
    x, _, keys = images
    y = linear_model(x).argmax(1)
    attack = PGD(norm="linf", eps=0.01, steps=5, restarts=2)
    whole = attack(linear_model, x, y, keys)
    parts = torch.cat(
        [attack(linear_model, x[i : i + 5], y[i : i + 5], keys[i : i + 5]) for i in range(0, 24, 5)]
    )
    assert torch.equal(linear_model(whole).argmax(1) != y, linear_model(parts).argmax(1) != y)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_takes_the_steps_of_foolbox(norm: str, images) -> None:  # type: ignore[no-untyped-def]
    x, y, keys = images
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 30), nn.Tanh(), nn.Linear(30, 5)).double().eval()
    theirs = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    reference = theirs(steps=7, abs_stepsize=0.01, random_start=False)
    model.requires_grad_(False)
    _, expected, _ = reference(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=0.03)
    ours = PGD(norm=norm, eps=0.03, steps=7, step_size=0.01, random_start=False, keep_best=False)  # type: ignore[arg-type]
    torch.testing.assert_close(ours(model, x, y, keys), expected, rtol=0, atol=1e-9)


def visited(model: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """Every batch that ``model`` receives from ``run``."""
    batches: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0].detach().clone()))
    run()
    handle.remove()
    return batches


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_takes_the_steps_of_its_authors(norm: Norm, loss: LossName, images) -> None:  # type: ignore[no-untyped-def]
    from pyautoattack.autopgd_base import APGDAttack

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 30), nn.Tanh(), nn.Linear(30, 5)).double().eval()
    x, _, keys = images
    y = model(x).argmax(1)
    threat = Threat(norm=norm, eps=0.02 if norm == "linf" else 0.1)
    start = threat.random_point(x, keys)
    theirs = APGDAttack(model, n_iter=60, norm={"linf": "Linf", "l2": "L2"}[norm], eps=threat.eps, loss=loss)
    theirs.init_hyperparam(x)

    torch.set_default_dtype(torch.float64)  # else their loss tables are float32 and break ties differently
    try:
        expected = visited(model, lambda: theirs.attack_single_run(x, y, x_init=start))
    finally:
        torch.set_default_dtype(torch.float32)
    best, batches = Best(x, y), MicroBatches(model, None)
    apgd = APGD(norm=norm, eps=threat.eps, steps=60)
    found = visited(model, lambda: apgd._run(batches, best, best.not_fooled, start, LOSSES[loss], y))

    assert len(found) == len(expected) == 61
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-6)
    assert (model(found[-1]).argmax(1) == y).any()  # so it was not stopped early


def test_mim_follows_its_formula(images) -> None:  # type: ignore[no-untyped-def]
    x, y, keys = images
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 30), nn.Tanh(), nn.Linear(30, 5)).double().eval()
    ours = PGD(
        norm="linf", eps=0.05, steps=4, step_size=0.01, random_start=False, momentum=1.0, keep_best=False
    )
    x_adv, g = x.clone(), torch.zeros_like(x)
    for _ in range(4):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        g = g + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
        x_adv = (x_adv.detach() + 0.01 * g.sign()).clamp(x - 0.05, x + 0.05).clamp(0, 1)
    torch.testing.assert_close(ours(model, x, y, keys), x_adv)


def test_dlr_follows_its_formula() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 0.0], [3.0, 1.0, 0.5, 2.0]])
    # -(z_y - max other) / (z_1 - z_3); targeted -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2).
    torch.testing.assert_close(dlr(logits, torch.tensor([2, 0])), torch.tensor([2 / 3, -1 / 2]))
    targeted = targeted_dlr(logits, torch.tensor([[2, 0], [0, 3]]))
    torch.testing.assert_close(targeted, torch.tensor([-1 / 3.5, -1 / 2.25]))
    scaled = dlr(1000 * logits + 7, torch.tensor([2, 0]))
    torch.testing.assert_close(scaled, dlr(logits, torch.tensor([2, 0])))


def test_targeted_dlr_needs_four_classes(images) -> None:  # type: ignore[no-untyped-def]
    x, y, keys = images
    three = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()
    with pytest.raises(ValueError, match="targets=9: the targeted DLR loss needs 4 classes or more, not 3"):
        APGD(norm="linf", eps=0.1, targets=9)(three, x, y, keys)
    # AutoAttack skips its targeted parts.
    x_adv = AutoAttack(norm="linf", eps=0.1, steps=5, queries=5)(three.float(), x.float(), y, keys)
    assert x_adv.shape == x.shape


class Peak(nn.Module):
    """Class 1 is likeliest where the mean is 0.55, and never likelier than class 0."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return torch.stack([torch.ones_like(mean), -10 * (mean - 0.55).abs()], dim=1)


def test_the_best_iterate_is_kept() -> None:
    x, y = torch.full((2, 1, 2, 2), 0.5), torch.zeros(2, dtype=torch.long)
    # The iterates are 0.5, 0.54, 0.58: the last step jumps over the peak.
    for keep_best, mean in ((True, 0.54), (False, 0.58)):
        attack = PGD(norm="linf", eps=0.2, steps=2, step_size=0.04, random_start=False, keep_best=keep_best)
        found = attack(Peak(), x, y, torch.arange(2))
        torch.testing.assert_close(found, torch.full_like(x, mean))


def test_random_points_are_uniform_in_the_ball() -> None:
    x = torch.full((4000, 1, 3, 3), 0.5)
    keys = fold(key(0, "ball"), torch.arange(4000))
    linf = Threat(norm="linf", eps=0.1).random_point(x, keys) - x
    assert linf.abs().max() <= 0.1 + 1e-6
    assert abs(linf.mean()) < 6 * 0.1 / 3**0.5 / 36_000**0.5
    radius = Threat(norm="l2", eps=0.1).distance(Threat(norm="l2", eps=0.1).random_point(x, keys), x) / 0.1
    assert radius.max() <= 1 + 1e-5
    # In 9 dimensions the radius of a uniform point has the mean 9/10.
    assert abs(radius.mean() - 0.9) < 0.01


def test_the_margin_is_positive_exactly_on_misclassifications() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    assert margin(logits, torch.tensor([0, 2])).tolist() == [-1, 2]


def test_a_minimum_norm_attack_in_another_norm_counts_inside_the_threat(images, linear_model) -> None:  # type: ignore[no-untyped-def]
    """Its smallest perturbations are judged in the threat, and not clipped at eps in their own norm."""
    x, _, keys = images
    y = linear_model(x).argmax(1)
    threat = Threat(norm="linf", eps=0.1)
    found = FoolboxAttack(foolbox.attacks.L2DeepFoolAttack(steps=20), threat)(linear_model, x, y, keys)
    assert (linear_model(found).argmax(1) != y).double().mean() > 0.5
    with pytest.raises(ValueError, match=r"works in L2.*the threat in linf"):
        FoolboxAttack(foolbox.attacks.L2PGD(), threat)


def test_restarts_without_a_random_start_are_refused() -> None:
    with pytest.raises(ValueError, match="restarts=3 needs random_start"):
        PGD(norm="linf", eps=0.1, restarts=3, random_start=False)


class Quantised(nn.Module):
    """A linear model of a quantised mean: its gradient is zero everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        mean = (x.flatten(1).mean(1) * 50).floor() / 50
        return torch.stack([torch.zeros_like(mean), mean - 0.53], dim=1)


def test_evolution_strategies_succeed_where_gradients_are_zero() -> None:
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.long)
    keys = fold(key(0, "steps"), torch.arange(3))
    threat = {"norm": "linf", "eps": 0.1}
    x_adv = EvolutionStrategies(**threat, steps=10, samples=100, sigma=0.05)(Quantised(), x, y, keys)
    assert (Quantised()(x_adv).argmax(1) == 1).all()
    with pytest.raises(ValueError, match=r"samples=7 is odd"):
        EvolutionStrategies(**threat, samples=7)


def test_nes_uses_the_number_of_queries_of_the_paper() -> None:
    """1,220,000 queries for an image that is never fooled; a fooled image is dropped."""
    sizes: list[int] = []

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    x = torch.full((1, 1, 1, 1), 0.5)
    NES(norm="linf", eps=0.031, chunk=20_000)(Constant(), x, torch.zeros(1, dtype=torch.long), torch.arange(1))
    assert sum(sizes) - 100 == 20 * 100 + 20 * 1_000 + 60 * 20_000  # and one query at the start of each step
    sizes.clear()
    NES(norm="linf", eps=0.031)(Constant(), x, torch.ones(1, dtype=torch.long), torch.arange(1))
    assert sum(sizes) == 1
    with pytest.raises(ValueError, match="nes is the published L-inf attack"):
        NES(norm="l2", eps=0.5)


def test_the_estimate_approximates_the_gradient_of_a_linear_margin() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    x, key_1 = torch.full((1, 1, 4, 4), 0.5).double(), fold(3, torch.arange(1))
    attack = EvolutionStrategies(norm="linf", eps=0.1, samples=20_000)
    with torch.no_grad():
        estimate = attack._estimate(
            MicroBatches(model, 1000), x, torch.zeros(1, dtype=torch.long), key_1, 20_000
        ).flatten()
        gradient = model[1].weight[1] - model[1].weight[0]
    assert torch.cosine_similarity(estimate, gradient, dim=0) > 0.99


def test_a_transfer_without_a_source_is_an_error(images) -> None:  # type: ignore[no-untyped-def]
    x, y, keys = images
    with pytest.raises(ValueError, match="no source network"):
        Transfer(source=None, attack=PGD(norm="linf", eps=0.1))(nn.Flatten(), x, y, keys)


def test_faulty_foolbox_attacks_are_refused_with_the_reason() -> None:
    for name in ("L2FMNAttack", "PointwiseAttack"):
        with pytest.raises(ValueError, match=f"foolbox's {name} is not to be used: it"):
            FoolboxAttack(getattr(foolbox.attacks, name)(), THREATS[1])


def test_an_image_without_a_starting_point_does_not_affect_the_others() -> None:
    class Half(nn.Module):
        """An image whose first pixel is bright is class 0 whatever its other pixels are."""

        def forward(self, x: Tensor) -> Tensor:
            score = torch.where(x[:, 0, 0, 0] < 0.5, x.flatten(1).mean(1) - 0.55, x.new_tensor(-1.0))
            return torch.stack([torch.zeros_like(score), score], dim=1)

    x = torch.full((6, 1, 3, 3), 0.5)
    x[:3, 0, 0, 0], x[3:, 0, 0, 0] = 0.4, 1.0
    y = torch.zeros(6, dtype=torch.long)

    class NoStart:
        def run(self, model, inputs, criterion, **kwargs):  # type: ignore[no-untyped-def]
            starts = inputs.clone()
            starts[:3, 0, 1:] = 1.0
            return starts

    attack = foolbox.attacks.BoundaryAttack(steps=50, source_step=0.1)
    attack.init_attack = NoStart()  # type: ignore[assignment]
    half = Half().eval()
    found = FoolboxAttack(attack, Threat(norm="linf", eps=0.3))(half, x, y, torch.arange(6))
    assert (half(found)[:3].argmax(1) == 1).all()
    assert torch.equal(found[3:], x[3:])


def all_attacks(threat: Threat) -> dict[str, Attack]:
    own: dict[str, Attack] = {name: make(threat) for name, make in MAKERS.items() if name != "transfer"}
    own["restarts"] = PGD(norm=threat.norm, eps=threat.eps, steps=7, restarts=3, loss="kl")
    own["apgd_kl"] = APGD(norm=threat.norm, eps=threat.eps, steps=7, restarts=2, loss="kl")
    own["bpda"] = BPDA(norm=threat.norm, eps=threat.eps, steps=7, restarts=3)
    own["bpda_kl"] = BPDA(norm=threat.norm, eps=threat.eps, steps=7, restarts=3, loss="kl")
    own["bpda_pgd"] = BPDA(norm=threat.norm, eps=threat.eps, steps=7, restarts=3, ascent="pgd")
    own["bpda_apgd"] = BPDA(norm=threat.norm, eps=threat.eps, steps=7, restarts=3, ascent="apgd")
    own["relaxed_transfer"] = RelaxedTransfer(norm=threat.norm, eps=threat.eps, steps=7, restarts=3)
    for version in ("plus", "rand"):
        own[version] = AutoAttack(norm="linf", eps=threat.eps, steps=6, queries=10, version=version)
    return {name: attack for name, attack in own.items() if attack.max_queries(10)}


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("name", all_attacks(THREATS[0]))
def test_no_attack_costs_more_than_max_queries(name: str, classes: int) -> None:
    """On images that are never fooled, where ``max_queries`` should also be close to the cost."""
    torch.manual_seed(0)
    x = torch.rand(3, 1, 6, 6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), KWTA(0.3), nn.Linear(20, classes)).eval()
    y = model(x).argmax(1)
    tiny = Threat(norm="linf", eps=1e-6)
    if classes < 4 and ("dlr" in name or name == "apgd_t"):
        return
    counted = QueryCounter(model.requires_grad_(False), x, y, tiny)
    attack = all_attacks(tiny)[name]
    found = attack(counted, x, y, torch.arange(3))
    assert (model(found).argmax(1) == y).all()
    forwards, backwards = attack.max_queries(classes) or (0, 0)
    # The library's FAB stops early on some images, so AutoAttack's is only an upper bound.
    slack = 3.0 if isinstance(attack, AutoAttack) else 1.05
    assert counted.forwards <= 3 * forwards <= slack * counted.forwards + 60
    assert counted.backwards <= 3 * backwards <= slack * counted.backwards
    # The relaxed network may misclassify images that the model classifies correctly.
    assert counted.queries.sum() == counted.forwards or name == "relaxed_transfer"


class BreaksOnBright(nn.Module):
    """Returns NaN, or a tie that counts as misclassified, where the image is bright."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1).mean(1)
        if self.kind == "tie":
            first = torch.where(bright > 0.52, 0, -1.0)
            return torch.stack([first, 0 * bright, -1 + bright * 0.01], 1)
        over = torch.where(bright > 0.52, {"nan": math.nan, "inf": math.inf}[self.kind], 0.0)
        return torch.stack([bright + over, 2 - bright + over, 0 * bright], 1)


@pytest.mark.parametrize("kind", ["nan", "tie"])
@pytest.mark.parametrize(
    "attack",
    [
        PGD(norm="linf", eps=0.1, steps=10, loss="margin"),
        PGD(norm="l2", eps=1.0, steps=10, loss="margin"),
        APGD(norm="linf", eps=0.1, steps=20, loss="margin"),
        SmoothedPGD(norm="linf", eps=0.1, steps=10, samples=3, loss="margin"),
        EvolutionStrategies(norm="linf", eps=0.1, steps=20, samples=40, sigma=0.02),
    ],
)
def test_misclassifications_by_nan_and_ties_are_returned(attack: Attack, kind: str) -> None:
    """The judge counts NaN and ties won by a wrong class as misclassified."""
    torch.manual_seed(0)
    model = BreaksOnBright(kind)
    x = 0.5 + 0.01 * torch.randn(8, 3, 4, 4)
    y = torch.ones(8, dtype=torch.long)
    assert not misclassified(model(x), y).any()
    x_adv = attack(model, x, y, torch.arange(8))
    assert x_adv.isfinite().all()
    assert misclassified(model(x_adv), y).all()


def test_the_ranking_margin_is_positive_exactly_where_the_judge_finds_a_misclassification() -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor([
        [0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1], [nan, 1, 0], [0, nan, 0], [inf, inf, 0], [0, inf, inf],
        [-inf, -inf, -inf], [0, -inf, 0],
    ])  # fmt: skip
    y = torch.ones(len(logits), dtype=torch.long)
    assert torch.equal(ranking_margin(logits, y) > 0, misclassified(logits, y))
    assert not ranking_margin(logits, y).isnan().any()
    assert torch.equal(ranking_margin(logits, y)[:2], margin(logits, y)[:2])


@pytest.mark.parametrize(("norm", "eps", "shape", "message"), [
    ("linf", 1.0, None, None),
    ("linf", 8.0, None, "at most 1, such as 8/255"),
    ("linf", 1000.0, None, "at most 1, such as 8/255"),
    ("l2", 128.0, None, None),
    ("l2", 128.0, (3, 32, 32), r"at most 55\.43, the largest distance between two images of shape"),
    ("l2", 55.0, (3, 32, 32), None),
])  # fmt: skip
def test_a_radius_in_other_units_is_refused(
    norm: str, eps: float, shape: tuple[int, ...] | None, message: str | None
) -> None:
    if message is None:
        check_radius(norm, eps, shape)
    else:
        with pytest.raises(ValueError, match=message):
            check_radius(norm, eps, shape)


def test_a_threat_refuses_a_radius_beyond_the_pixel_range() -> None:
    with pytest.raises(ValueError, match="such as 8/255"):
        Threat(norm="linf", eps=8)


class WithoutGraph(nn.Module):
    """A network whose logits come back from NumPy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return torch.from_numpy(logits.detach().numpy())


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "transfer"])
def test_attacks_run_on_a_network_whose_logits_have_no_graph(name: str, images) -> None:  # type: ignore[no-untyped-def]
    x, y, keys = images
    x = x.float()
    model = WithoutGraph(far_from_error(torch.ones(48), (0.0, 0.0, 0.0)).float()).eval()
    threat = Threat(norm="l2", eps=0.5) if name in ("cw", "ddn", "ead") else THREATS[0]
    found = MAKERS[name](threat)(model, x, y, keys)
    assert found.isfinite().all()
    assert (threat.distance(found, x) <= threat.eps + 1e-5).all()
