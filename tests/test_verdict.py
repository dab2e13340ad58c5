"""The verdict is sound only after all tests, and never masked for a network with useful gradients."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kwta_exp.activations
import kwta_exp.evaluation
from kwta_exp.activations import KWTA
from kwta_exp.attacks import (
    APGD,
    BPDA,
    PGD,
    Attack,
    CallableAttack,
    EvolutionStrategies,
    Square,
    Threat,
    Transfer,
    as_attack,
)
from kwta_exp.attacks.base import MicroBatches
from kwta_exp.data.batches import Split, to_float
from kwta_exp.evaluation import Diagnosis, Evaluation, Outcome, Roles, evaluate
from kwta_exp.evaluation.binarized import binarize, last_linear, readout
from kwta_exp.evaluation.checks import CHECKS, table
from kwta_exp.evaluation.checks.gradients import ascent, change_unseen_by_gradients
from kwta_exp.evaluation.checks.repetition import most_successful
from kwta_exp.evaluation.query_counter import Owners
from kwta_exp.evaluation.records import Record
from kwta_exp.evaluation.verdict import Tried, verdict
from kwta_exp.randomness import fold
from kwta_exp.report.terminal import results_table

EPS = 0.1
THREAT = Threat(norm="linf", eps=EPS)
PASSED = {"binarization_missed": 0.0, "repeating_finds_more": 0.0, "gain_over_plain_pgd": 0.0}


def verdict_of(measured: dict[str, float], n: int = 100, **tried: bool) -> Any:
    return verdict(measured, n, Tried(**tried))


def test_masked_needs_a_significant_gain_over_plain_pgd() -> None:
    # 10 of 100 have a Wilson interval from 5.5%; 9 of 100 from 4.8%.
    found = [
        verdict_of({"gain_over_plain_pgd": share}, checks=False)["verdict"] for share in (0.0, 0.09, 0.10, 0.8)
    ]
    assert found == ["untested", "untested", "masked", "masked"]
    masked = verdict_of({"gain_over_plain_pgd": 0.3}, checks=False)
    flag = masked["flags"][0]
    assert (flag["check"], flag["value"], flag["threshold"]) == ("gain_over_plain_pgd", 0.3, 0.05)
    assert "30 of 100" in masked["explanation"]


@pytest.mark.parametrize("sign", [name for name, check in CHECKS.items() if check.sign])
def test_masked_needs_a_sign_of_masking_if_signs_were_measured(sign: str) -> None:
    weak = verdict_of(PASSED | {"gain_over_plain_pgd": 0.5})
    assert weak["verdict"] == "sound"
    assert "Plain PGD is weak here: it misses 50 of 100 images" in weak["explanation"]
    assert verdict_of(PASSED | {"gain_over_plain_pgd": 0.5, sign: 0.9})["verdict"] == "masked"


def test_sound_needs_all_tests() -> None:
    assert verdict_of(PASSED)["verdict"] == "sound"
    for missing in ("baseline_pgd", "without_gradient"):
        assert verdict_of(PASSED, **{missing: False})["verdict"] == "untested"
    for missing in ("binarization_missed", "repeating_finds_more"):
        assert verdict_of({k: v for k, v in PASSED.items() if k != missing})["verdict"] == "untested"
    assert verdict_of({}, attacks=False)["verdict"] == "untested"


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "gain_over_plain_pgd"])
def test_every_check_raises_its_flag_above_its_threshold(name: str) -> None:
    check = CHECKS[name]
    fine, raised = verdict_of(PASSED | {name: check.threshold}), verdict_of(PASSED | {name: 0.9})
    assert fine["flags"] == []
    assert fine["verdict"] == "sound"
    assert [flag["check"] for flag in raised["flags"]] == [name]
    assert raised["flags"][0]["source"] == check.source
    assert check.meaning in raised["explanation"]
    assert raised["verdict"] == ("suspect" if check.bears_on == "worst case" else "sound")
    also = verdict_of(PASSED | {name: 0.9, "gain_over_plain_pgd": 0.5}, checks=False)
    assert also["verdict"] == "masked"
    assert (check.meaning in also["explanation"]) == (check.bears_on == "worst case")


def test_a_paired_share_is_compared_by_the_lower_end_of_its_interval() -> None:
    few = verdict_of(PASSED | {"black_box_finds_more": 0.05}, n=20)
    many = verdict_of(PASSED | {"black_box_finds_more": 0.05}, n=2000)
    assert (few["verdict"], many["verdict"]) == ("sound", "suspect")


def test_the_baseline_is_untargeted_pgd_of_enough_steps_on_the_cross_entropy() -> None:
    suite: dict[str, Any] = {
        "pgd": PGD(norm="linf", eps=0.1, steps=20),
        "weak": PGD(norm="linf", eps=0.1, steps=19),
        "margin": PGD(norm="linf", eps=0.1, steps=40, loss="margin"),
        "targeted": PGD(norm="linf", eps=0.1, steps=40, targets=3),
        "fgsm": PGD(norm="linf", eps=0.1, steps=1),
        "mine": CallableAttack(lambda model, x, y, keys: x, THREAT),
    }
    suite["smaller"] = PGD(norm="linf", eps=0.05, steps=40)
    suite["other"] = PGD(norm="l2", eps=0.1, steps=40)
    suite["short"] = PGD(norm="linf", eps=0.1, steps=40, step_size=0.001)
    assert Roles.of(suite, THREAT) == Roles(baseline_pgd=("pgd",), single_step=("fgsm",))


def test_the_evaluation_does_not_name_activations() -> None:
    folder = Path(kwta_exp.evaluation.__file__).parent
    names = "|".join(["ReLU", "relu", "Sigmoid", "Tanh", "GELU", *kwta_exp.activations.__all__])
    for path in folder.rglob("*.py"):
        assert not re.search(rf"\b({names})\b|kwta_exp\.activations", path.read_text()), path


class Grey(nn.Module):
    """Flattens images, centres their pixels and computes in float64, so that rounding decides no verdict."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).double() - 0.5


def random_net(features: nn.Module | None = None) -> nn.Module:
    """A random network on 6x6 images, in float64."""
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Linear(36, 64), features or nn.ReLU(), nn.Linear(64, 96), nn.ReLU())
    model = nn.Sequential(Grey(), hidden, nn.Linear(96, 4)).double()
    for parameter in model.parameters():
        parameter.data *= 2
    return model.eval().requires_grad_(False)


class Quantised(nn.Module):
    """Quantises the pixels to 21 levels: a piecewise constant function."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 20).round() / 20


class Scaled(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


class Noise(nn.Module):
    def __init__(self, by: float = 0.1) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by * torch.randn_like(x)


def labelled_by(model: nn.Module, n: int = 40) -> Split:
    """Random images, with the model's predictions as labels."""
    x = (torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(1)) * 255).to(torch.uint8)
    return Split(x, model(to_float(x)).argmax(1), torch.arange(n))


SUITE: dict[str, Attack] = {
    "fgsm": PGD(norm="linf", eps=EPS, steps=1, step_size=EPS, random_start=False),
    "pgd": PGD(norm="linf", eps=EPS, steps=20, restarts=2),
    "apgd_t": APGD(norm="linf", eps=EPS, steps=20, targets=3),
    "bpda": BPDA(norm="linf", eps=EPS, steps=20, restarts=3),
    "square": Square(norm="linf", eps=EPS, queries=300),
    "es": EvolutionStrategies(norm="linf", eps=EPS, steps=20, samples=100, sigma=0.06, step_size=0.02),
}


def judged(model: nn.Module, folder: Path, suite: dict[str, Attack] = SUITE, checks_n: int = 16) -> Any:
    attacks = {name: as_attack(attack, THREAT) for name, attack in suite.items()}
    evaluation = Evaluation(model, labelled_by(model), attacks, THREAT, folder, batch_size=40)
    return evaluate(evaluation, {"name": "a"}, checks_n)


def test_a_network_with_useful_gradients_is_sound(tmp_path: Path) -> None:
    masking = judged(random_net(), tmp_path)["masking"]
    assert (masking["verdict"], masking["flags"]) == ("sound", [])
    assert {entry["check"] for entry in masking["passed"]} == set(CHECKS)
    assert masking["checks_n"] == 16
    assert masking["binarization"]["problems"] == masking["binarization"]["tried"] == 16
    assert masking["binarization"]["success_rates"]["pgd"] == 1
    assert masking["binarization"]["random_success_rate"] < 1


MASKING: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "a quantised input": (
        lambda: nn.Sequential(Quantised(), random_net()),
        {"gradients_are_zero", "change_unseen_by_gradients", "robust_at_large_eps"},
    ),
    "large logits": (lambda: nn.Sequential(random_net(), Scaled(1000.0)), {"gradients_are_zero"}),
    "kwta": (lambda: random_net(KWTA(ratio=0.2)), {"change_unseen_by_gradients", "binarization_missed_by_pgd"}),
}


@pytest.mark.parametrize("name", MASKING)
def test_masked_gradients_raise_the_expected_checks(name: str, tmp_path: Path) -> None:
    make, expected = MASKING[name]
    masking = judged(make().eval().requires_grad_(False), tmp_path)["masking"]
    raised = {flag["check"] for flag in masking["flags"]}
    assert expected <= raised
    if name != "kwta":
        assert masking["verdict"] == "masked"


class Wrapped(nn.Module):
    """The same network with other module names, one level deeper."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.something_else = nn.ModuleDict({"renamed": nn.Sequential(nn.Identity(), inner)})

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.something_else["renamed"](x)
        return logits


def test_module_names_and_wrappers_do_not_change_the_verdict(tmp_path: Path) -> None:
    model = random_net(KWTA(ratio=0.2))
    bare, wrapped = judged(model, tmp_path / "a"), judged(Wrapped(model), tmp_path / "b")
    assert bare["masking"] == wrapped["masking"]
    assert bare["worst_case"] == wrapped["worst_case"]


def test_random_outputs_and_probabilities_are_detected(tmp_path: Path) -> None:
    random = judged(nn.Sequential(random_net(), Noise()), tmp_path / "a", {"pgd": SUITE["pgd"]})["masking"]
    assert "outputs_are_random" in {flag["check"] for flag in random["flags"]}
    noisy = judged(nn.Sequential(Noise(3.0), random_net()), tmp_path / "c", {"pgd": SUITE["pgd"]})["masking"]
    assert noisy["binarization"]["problems"] < 8  # no test is made
    assert "success_rates" not in noisy["binarization"]
    assert noisy["verdict"] != "sound"
    soft = judged(nn.Sequential(random_net(), nn.Softmax(1)), tmp_path / "b", {"pgd": SUITE["pgd"]})["masking"]
    assert "outputs_are_probabilities" in {flag["check"] for flag in soft["flags"]}


def test_an_attack_that_returns_the_clean_image_is_detected(tmp_path: Path) -> None:
    idle: dict[str, Any] = {"idle": lambda model, x, y, keys: x + 0 * model(x).sum()}
    masking = judged(random_net(), tmp_path, idle)["masking"]
    assert masking["verdict"] == "suspect"
    raised = {flag["check"]: flag["value"] for flag in masking["flags"]}
    assert raised["binarization_missed"] == 1
    assert raised["random_search_finds_more"] > 0


def test_a_random_attack_fools_more_images_when_repeated(tmp_path: Path) -> None:
    """The attack tries one random corner of the ball."""

    def random_corner(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        model(x)
        return THREAT.project(x + EPS * torch.randn(x.shape).sign(), x)

    masking = judged(random_net(), tmp_path, {"random_corner": random_corner})["masking"]
    assert {flag["check"]: flag["value"] for flag in masking["flags"]}["repeating_finds_more"] > 0.02


def test_a_transfer_attack_raises_black_box_checks_but_never_makes_a_verdict_sound(tmp_path: Path) -> None:
    transfer = Transfer(source="elsewhere", attack=SUITE["pgd"])
    transfer.connect(random_net())
    model = nn.Sequential(Quantised(), random_net()).eval().requires_grad_(False)
    masking = judged(model, tmp_path, {"pgd": SUITE["pgd"], "transfer": transfer})["masking"]
    raised = {flag["check"] for flag in masking["flags"]}
    assert {"black_box_finds_more", "gain_over_plain_pgd"} <= raised
    plain = judged(random_net(), tmp_path / "b", {"pgd": SUITE["pgd"], "transfer": transfer})["masking"]
    assert plain["verdict"] == "untested"


def test_gradient_checks_give_known_values_on_simple_networks() -> None:
    x = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(3)) * 0.6 + 0.2
    keys = fold(3, torch.arange(6))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    y = linear(x).argmax(1)

    def unseen(network: nn.Module) -> Tensor:
        return change_unseen_by_gradients(MicroBatches(network, None), x, y, keys, THREAT)[
            "change_unseen_by_gradients"
        ]

    assert unseen(linear).max() < 0.02  # the runner-up class may change
    quantised = nn.Sequential(Quantised(), linear)
    assert unseen(quantised).min() == 1
    measured = ascent(MicroBatches(quantised, None), x, quantised(x).argmax(1), keys, THREAT)
    assert torch.equal(measured["gradients_are_zero"], torch.ones(6, dtype=torch.double))
    assert not measured["gradients_are_not_finite"].any()
    not_finite = nn.Sequential(linear, NaNGradient())
    measured = ascent(MicroBatches(not_finite, None), x, y, keys, THREAT)
    assert measured["gradients_are_not_finite"].nanmean() == 1


class NaNGradient(nn.Module):
    """The identity, with a gradient of NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x - x.detach()).abs().sqrt().nan_to_num()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_binarized_model_has_the_adversarial_example_it_claims(norm: Any) -> None:
    model = random_net()
    threat = Threat(norm=norm, eps=0.1 if norm == "linf" else 0.5)
    made = binarize(model, labelled_by(model, 8), threat, 0, 100)
    x = to_float(made.images.x)
    assert len(x) == made.tried == 8
    assert made.network(x).argmax(1).tolist() == [0] * 8
    assert made.network(made.x_adv).argmax(1).tolist() == [1] * 8
    assert made.network(made.x_adv.flip(0)).argmax(1).tolist() == [1] * 8  # in any order
    distance = threat.distance(made.x_adv, x)
    assert (distance <= threat.eps + 1e-6).all()
    assert (distance > 0.8 * threat.eps).all()
    inside = threat.random_point(x, fold(9, torch.arange(8)))
    assert made.network(inside).argmax(1).sum() <= 1
    # The margin at the clean image is the network's own.
    original = model(x).topk(2).values
    binarized = made.network(x)
    torch.testing.assert_close(
        binarized[:, 0] - binarized[:, 1], original[:, 0] - original[:, 1], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("wide", [False, True])
def test_the_readout_is_a_ridge_regression(wide: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = (8, 20) if wide else (60, 5)
    features = torch.randn(rows, columns, generator=generator, dtype=torch.double)
    features[-1] += 3
    weight, threshold = readout(features, torch.tensor(2.0))
    score = features @ weight - threshold
    assert (score[:-1] < 0).all()
    assert score[-1] > 0
    assert score[0].item() == pytest.approx(-2)
    # Up to scale it is the weighted least-squares solution with the strongest penalty.
    root = torch.ones(rows, dtype=torch.double)
    root[-1] = (rows - 1) ** 0.5
    share = root**2 / (root**2).sum()
    target = torch.full((rows,), -1.0, dtype=torch.double)
    target[-1] = 1
    centred = root[:, None] * (features - share @ features)
    penalty = 100 * centred.square().sum() / columns * torch.eye(columns, dtype=torch.double)
    expected = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (root * (target - share @ target)))
    torch.testing.assert_close(weight / weight.norm(), expected / expected.norm())


def test_the_readout_replaces_only_a_last_linear_layer() -> None:
    model = nn.Sequential(random_net(), Scaled(7.0))
    assert last_linear(model, torch.rand(1, 1, 6, 6)) is model[0][2]
    split = nn.Sequential(Grey(), nn.Unflatten(1, (4, 9)), nn.Linear(9, 3), nn.Flatten()).double()
    assert last_linear(split, torch.rand(1, 1, 6, 6)) is None  # its rows are not images
    without = nn.Sequential(nn.Conv2d(1, 4, 6), nn.Flatten())
    assert last_linear(without, torch.rand(1, 1, 6, 6)) is None
    made = binarize(without.eval().requires_grad_(False), labelled_by(without, 4), THREAT, 0, 100)
    assert made.tried == 4  # the readout is fitted on logits


def test_a_stopped_diagnosis_continues_to_the_same_values(tmp_path: Path) -> None:
    once = judged(random_net(), tmp_path / "a")["masking"]
    for path in (tmp_path / "a").glob("binarized-*/*.npz"):
        path.unlink()
    assert judged(random_net(), tmp_path / "a")["masking"] == once
    assert np.isfinite([entry["value"] for entry in once["passed"]]).all()


def test_an_empty_diagnosis_has_no_measurements() -> None:
    assert Diagnosis().measured == {}


def test_the_documentation_has_the_table_of_checks() -> None:
    """``python -m scripts.verdict`` writes it."""
    page = (Path(__file__).parent.parent / "docs" / "verdict.md").read_text()
    assert table() in page
    for check in CHECKS.values():
        assert f"| `{check.name}` | {check.bears_on} | {check.threshold:g} |" in table()


def test_fewer_than_eight_binarized_models_are_not_a_test(tmp_path: Path) -> None:
    few = judged(random_net(), tmp_path, {"pgd": SUITE["pgd"], "square": SUITE["square"]}, checks_n=7)[
        "masking"
    ]
    assert few["binarization"] == {"tried": 7, "problems": 7}
    assert few["verdict"] == "untested"


def test_the_terminal_shows_the_raised_checks(tmp_path: Path) -> None:
    results = judged(nn.Sequential(random_net(), Scaled(1000.0)).eval().requires_grad_(False), tmp_path)
    shown = results_table(results | {"run": {"name": "a", "seed": 0}}, width=80)
    for flag in results["masking"]["flags"]:
        assert f"  {flag['check']}: {flag['value']:.3f}" in shown
    assert "MASKED" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_a_softmax_after_the_last_layer_does_not_hide_masking(tmp_path: Path) -> None:
    """The weights before the softmax are so large that no attack succeeds."""
    model = random_net()
    model[2].weight.data *= 1e5
    model = nn.Sequential(model, nn.Softmax(1)).eval().requires_grad_(False)
    masking = judged(model, tmp_path)["masking"]
    raised = {flag["check"] for flag in masking["flags"]}
    assert {"gradients_are_zero", "binarization_missed_by_pgd"} <= raised
    assert masking["verdict"] in ("masked", "suspect")


def test_a_scale_after_the_last_layer_does_not_make_binarized_models_harder(tmp_path: Path) -> None:
    model = nn.Sequential(random_net(), Scaled(64.0)).eval().requires_grad_(False)
    binarization = judged(model, tmp_path, {"pgd": SUITE["pgd"]})["masking"]["binarization"]
    assert binarization["success_rates"]["pgd"] > 0.9


def test_a_weak_suite_is_never_sound(tmp_path: Path) -> None:
    weak = {"fgsm": SUITE["fgsm"], "square": Square(norm="linf", eps=EPS, queries=1)}
    assert judged(random_net(), tmp_path, weak)["masking"]["verdict"] in ("untested", "suspect")


def test_the_attack_to_repeat_is_chosen_on_the_images_that_all_attacks_ran_on() -> None:
    def record(name: str, index: list[int], fooled: list[int], forwards: int) -> Record:
        rows = {"index": np.array(index), "fooled": np.isin(index, fooled)}
        made = Record(Path(name))
        made.append(rows, forwards, 0, 0.0)
        return made

    # On the first four images "strong" fools more; of the others it saw only those that "weak" had not fooled.
    records = {
        "weak": record("weak", list(range(12)), [0, 4, 5, 6, 7, 8, 9, 10], 12),
        "strong": record("strong", [0, 1, 2, 3, 11], [0, 1, 2], 50),
    }
    rows = {"index": np.arange(12), "label": np.zeros(12), "prediction": np.zeros(12)}
    clean = Record(Path("clean"))
    clean.append(rows, 12, 0, 0.0)
    outcome, images = Outcome(clean, records), labelled_by(random_net(), 12)
    pgd, fgsm = SUITE["pgd"], SUITE["fgsm"]
    for strong, expected in ((pgd, "strong"), (fgsm, "weak")):
        suite = {"weak": pgd, "strong": strong}
        evaluation = Evaluation(random_net(), images, suite, THREAT, Path("nowhere"), diagnostic_n=4)
        assert most_successful(evaluation, outcome) == expected


class NoGradient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * 1


class Overflow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1e30 * 1e30


def test_networks_without_gradients_or_finite_features_can_be_judged(tmp_path: Path) -> None:
    square = {"square": SUITE["square"]}
    masking = judged(nn.Sequential(NoGradient(), random_net()), tmp_path / "a", square)["masking"]
    raised = {flag["check"] for flag in masking["flags"]}
    assert {"gradients_are_zero", "robust_at_large_eps"} <= raised
    assert masking["verdict"] == "suspect"
    model = random_net()
    infinite = nn.Sequential(model[0], model[1], Overflow(), model[2]).eval()
    images = Split(labelled_by(model).x, torch.zeros(40, dtype=torch.long), torch.arange(40))
    assert len(binarize(infinite, images, THREAT, 0, 100).images) == 0


def test_identical_images_are_attributed_to_one_of_them() -> None:
    x = torch.rand(3, 1, 6, 6)
    owners = Owners(torch.cat([x, x[:1]]), THREAT)
    assert (owners._safe > 0).all()
    assert owners(x[:1] + 0.01).tolist()[0] in (0, 3)
