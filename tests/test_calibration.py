"""The networks of the calibration are what they are said to be, and its page counts right.

What the verdict says of them takes hours: `make calibrate`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import calibration
from benchmarks import calibration_disguises as disguises
from benchmarks import calibration_networks as networks
from benchmarks.calibration import (
    Job,
    collected,
    dressed,
    entries,
    entry,
    in_processes,
    must_be,
    untrained,
)
from benchmarks.calibration_networks import HIDDEN, SETS, SPARSE, Specimen, linear, normed
from benchmarks.calibration_page import page, wrong
from torch import Tensor, nn

from kwta_exp.activations import LWTA, kwta
from kwta_exp.attacks.base import input_gradient
from kwta_exp.evaluation.checks import CHECKS
from kwta_exp.storage import write_json

JOBS = [Job(key, one.name, Path("none"), Path("none")) for key, of_set in SETS.items() for one in of_set]


@pytest.fixture
def images() -> Tensor:
    """Images of the shades of an 8-bit file, all 256 of them among them."""
    torch.manual_seed(0)
    shades = torch.randint(256, (8, 1, 8, 8))
    shades[:4] = torch.arange(256).view(4, 1, 8, 8)
    return shades / 255


def gradient(module: nn.Module, x: Tensor) -> Tensor:
    """Of a linear function of the module's output; the classes are the pixels."""
    weights = torch.arange(1.0, x[0].numel() + 1)
    network = nn.Sequential(module, nn.Flatten())
    y = torch.zeros(len(x), dtype=torch.long)
    return input_gradient(network, x, y, lambda logits, _: logits @ weights)[0]


# The sets


@pytest.mark.parametrize("key", SETS)
def test_a_set_has_twenty_networks_or_more_each_with_its_own_name(key: str) -> None:
    names = [each.name for each in SETS[key]]
    assert len(names) >= 20
    assert len(set(names)) == len(names)


def test_the_second_set_has_no_network_of_the_first_but_the_linear_one() -> None:
    first, second = ({each.name for each in of_set} for of_set in SETS.values())
    assert first & second == {"linear"}


@pytest.mark.parametrize("key", SETS)
def test_a_disguised_network_names_an_honest_one_of_its_set_trained_alike(key: str) -> None:
    by_name = {each.name: each for each in SETS[key]}
    dressed_up = [each for each in SETS[key] if each.of]
    assert len(dressed_up) >= 10
    for each in dressed_up:
        honest = by_name[each.of or ""]
        assert (honest.must, honest.of, honest.before, honest.after) == ("sound", None, None, None)
        assert honest.adversarial == each.adversarial
        assert each.network is honest.network or each.alters
        assert each.must != "sound"


def test_random_networks_have_no_floor() -> None:
    kinds = [each.floor_of for of_set in SETS.values() for each in of_set if each.must == "not sound"]
    assert kinds == [None] * 8


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.key}: {job.name}")
def test_every_network_is_made_and_gives_logits(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    side = {"setting": 8, "trying": 28}[job.key]

    def made(job: Job) -> nn.Module:
        return job.specimen.network(num_classes=10, in_channels=1, image_size=(side, side))

    monkeypatch.setattr(calibration, "untrained", made)
    monkeypatch.setattr(calibration, "trained", lambda job: made(job.honest()))
    network, x = dressed(job), torch.rand(3, 1, side, side)
    assert network(x).shape == (3, 10)
    assert not network.training
    is_random = not torch.equal(network(x), network(x))
    assert is_random == (job.specimen.must == "not sound")


def test_a_disguise_has_the_honest_weights_and_a_job_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("setting", "cnn relu, logits x 1000", Path("data"), Path("work"))
    assert job.folder == Path("work/digits/cnn_relu_logits_x_1000")
    assert job.honest().folder == Path("work/digits/cnn_relu")
    honest = untrained(job.honest())
    for parameter in honest.parameters():
        nn.init.normal_(parameter)
    monkeypatch.setattr(calibration, "trained", lambda job: honest)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(dressed(job)(x), 1000 * honest(x))


# The disguises


def rounded(x: Tensor) -> Tensor:
    return (x * 176).round() / 176


@pytest.mark.parametrize(
    "disguise", [disguises.InNumPy(), disguises.OwnBackward(0.0), disguises.OwnBackward(1.0)], ids=str
)
def test_rounding_in_other_ways_gives_the_same_images(disguise: nn.Module, images: Tensor) -> None:
    assert torch.equal(disguise(images), rounded(images))
    assert disguise(images.double()).dtype == torch.float64


def test_a_steep_staircase_is_the_staircase_but_on_its_steps(images: Tensor) -> None:
    from_a_step = ((images * 64) - (images * 64).round()).abs() / 64
    off = (disguises.SteepStaircase()(images) - disguises.Staircase()(images)).abs()
    assert off[from_a_step > 0.0035].max() < 1e-5
    assert off.max() <= 1 / 64 + 1e-6


@pytest.mark.parametrize("levels", [16, 64])
def test_a_thermometer_is_the_staircase_by_floor(levels: int, images: Tensor) -> None:
    assert torch.equal(disguises.Thermometer(levels)(images), (images * levels).floor() / levels)
    assert torch.equal(disguises.Staircase(levels)(images), (images * levels).floor() / levels)


@pytest.mark.parametrize(
    ("disguise", "least"),
    [
        (disguises.Quantised(), 0.5 / 16),
        (disguises.Staircase(), 1 / 64),
        (disguises.SteepStaircase(), 1 / 64),
        (disguises.Shattered(), 0.004),
        (disguises.Masked(), 0.02),
    ],
    ids=str,
)
def test_a_disguise_moves_no_pixel_further_than_it_says(
    disguise: nn.Module, least: float, images: Tensor
) -> None:
    before = images.clone()
    assert (disguise(images) - images).abs().max() <= least + 1e-6
    assert torch.equal(images, before)


def test_logits_keep_their_order_in_any_disguise_after_them() -> None:
    torch.manual_seed(0)
    logits = torch.randn(200, 10)
    for disguise in (disguises.Loud(), disguises.Saturated()):
        assert torch.equal(disguise(logits).argmax(1), logits.argmax(1))


@pytest.mark.parametrize(
    "disguise",
    [
        disguises.Quantised(), disguises.Staircase(), disguises.Thermometer(), disguises.InNumPy(),
        disguises.OwnBackward(0.0),
    ],
    ids=str,
)  # fmt: skip
def test_a_hidden_gradient_is_zero(disguise: nn.Module, images: Tensor) -> None:
    assert not gradient(disguise, images).any()


def test_a_saturated_softmax_has_no_gradient_where_logits_differ() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]]).requires_grad_()
    disguises.Saturated()(logits)[0, 0].backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_the_gradient_that_is_left_is_the_true_one(images: Tensor) -> None:
    true = gradient(nn.Identity(), images)
    assert torch.equal(gradient(disguises.OwnBackward(1.0), images), true)
    assert torch.equal(gradient(disguises.Masked(), images), true * (images >= 0.02))
    steep = gradient(disguises.SteepStaircase(), images)
    assert 0 < steep.min() < 1e-20 < 1 < steep.max()


# Winners take all, and chance


def test_k_wta_in_plain_pytorch_is_k_wta() -> None:
    torch.manual_seed(0)
    for x in (torch.randn(5, 40), torch.randn(5, 4, 6, 6)):
        assert torch.equal(disguises.ThresholdKWTA(0.2)(x), kwta(x, 0.2))
        assert torch.equal(disguises.ScatterKWTA(0.2)(x), kwta(x, 0.2))


def test_lwta_in_plain_pytorch_is_lwta() -> None:
    torch.manual_seed(0)
    for x in (torch.randn(5, 40), torch.randn(5, 4, 6, 6)):
        assert torch.equal(disguises.EqualLWTA()(x), LWTA(group_size=2)(x))
        assert torch.equal(disguises.ArgmaxLWTA()(x), LWTA(group_size=2)(x))


def test_random_lwta_keeps_one_of_each_pair() -> None:
    torch.manual_seed(0)
    layer, x = disguises.RandomLWTA().eval(), 1 + torch.rand(50, 8, 4, 4)
    out = layer(x).unflatten(1, (4, 2))
    kept = (out - x.unflatten(1, (4, 2))).abs() < 1e-3
    assert (kept.sum(2) == 1).float().mean() > 0.9  # at temperature 0.01 a draw is seldom near a tie
    assert (out.amin(2).abs() < 1e-3).float().mean() > 0.9


def test_a_sparsed_norm_sets_a_fifth_of_a_deviation_around_the_mean_to_the_mean() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(disguises.SparsedNorm(3))
    honest = nn.BatchNorm2d(3)
    for norm in (network[0], honest):
        norm.weight.data = torch.tensor([1.0, -2.0, 0.5])
        norm.bias.data = torch.tensor([0.0, 1.0, -1.0])
    x = torch.randn(20, 3, 8, 8)
    assert torch.equal(network(x), honest(x))
    out, before = network.eval()(x), honest.eval()(x)
    mean = honest.bias.view(1, 3, 1, 1).expand_as(x)
    changed = out != before
    assert torch.equal(out[changed], mean[changed])
    assert changed.float().mean().item() == pytest.approx(0.159, abs=0.02)  # of a normal value, within 0.2


def test_a_random_shift_moves_a_point_by_at_most_a_pixel_each_way() -> None:
    torch.manual_seed(0)
    x = torch.zeros(200, 2, 5, 7)
    x[:, :, 2, 3] = 1
    out = disguises.RandomShift()(x)
    assert out.shape == x.shape
    assert torch.equal(out[:, 0], out[:, 1])
    points = {tuple(position) for position in out[:, 0].nonzero()[:, 1:].tolist()}
    assert points == {(row, column) for row in (1, 2, 3) for column in (2, 3, 4)}


def test_attention_by_hand_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = networks.OwnAttention(8, 4), networks.TorchAttention(8, 4)
    ours.inward.weight, ours.inward.bias = theirs.attention.in_proj_weight, theirs.attention.in_proj_bias
    ours.outward.weight, ours.outward.bias = theirs.attention.out_proj.weight, theirs.attention.out_proj.bias
    tokens = torch.randn(2, 5, 8)
    torch.testing.assert_close(ours(tokens), theirs(tokens))


# What must be, and the page


@pytest.mark.parametrize(
    ("must", "pgd", "truth", "expected"),
    [
        (HIDDEN, 0.9, 0.8, "masked"),
        (HIDDEN, 0.9, 0.85, "not sound"),
        (SPARSE, 0.89, 0.79, "masked"),
        (SPARSE, 0.9, 0.85, None),
        ("sound", 0.9, 0.2, "sound"),
        ("not sound", 0.9, 0.2, "not sound"),
        (None, 0.9, 0.2, None),
    ],
)
def test_what_a_verdict_must_be(must: str | None, pgd: float, truth: float, expected: str | None) -> None:
    assert must_be(Specimen("a", must, linear), pgd, truth) == expected


def results(pgd: float, worst: float, verdict: str) -> dict[str, Any]:
    """A results.json of invented numbers."""
    return {
        "threat": {"eps": 0.1},
        "clean": {"accuracy": 0.99},
        "attacks": {"pgd": {"robust_accuracy": pgd}},
        "worst_case": {"robust_accuracy": worst},
        "masking": {
            "verdict": verdict, "flags": [], "binarization": {},
            "passed": [{"check": name, "value": 0.0} for name in CHECKS],
        },
    }  # fmt: skip


def test_a_floor_is_the_honest_worst_case_and_decides_what_must_be() -> None:
    known = {
        "cnn relu": results(0.41, 0.40, "sound"),
        "cnn relu, shattered gradients": results(0.49, 0.42, "suspect"),
        "cnn relu, logits x 1000": results(0.99, 0.43, "masked"),
        "cnn relu, noisy input": results(0.60, 0.50, "suspect"),
    }
    honest, shattered, loud, noisy = entries("setting", known)
    assert (honest["floor"], honest["within"]) == (None, None)
    assert (shattered["floor"], shattered["within"], shattered["must"]) == (0.40, True, "not sound")
    assert (loud["floor"], loud["within"], loud["must"]) == (0.40, False, "masked")
    assert (noisy["floor"], noisy["within"], noisy["must"]) == (None, None, "not sound")
    del known["cnn relu"]
    assert entries("setting", known)[0]["floor"] is None


def record(of_second: str) -> dict[str, list[dict[str, Any]]]:
    """A record of invented numbers: two verdicts in the first set, in the second one more."""
    honest = Specimen("invented honest", "sound", normed(nn.ReLU))
    loud = Specimen("invented loud", HIDDEN, normed(nn.ReLU), of="invented honest")
    shown = Specimen("invented unknown", None, normed(nn.ReLU), of="invented honest")
    one = entry(honest, results(0.3, 0.3, "sound"), None)
    return {
        "setting": [one, entry(loud, results(0.9, 0.31, "masked"), 0.3)],
        "trying": [
            one,
            entry(loud, results(0.9, 0.3, "masked"), 0.3),
            entry(loud, results(0.9, 0.7, of_second), 0.3),
            entry(shown, results(0.3, 0.1, "sound"), 0.3),
        ],
    }


@pytest.mark.parametrize(
    ("of_second", "right", "trusted", "aim"),
    [
        ("masked", "5 of 5 of all networks (100.0%), 3 of 3 of the second set (100.0%)", 0, "reached"),
        ("suspect", "4 of 5 of all networks (80.0%), 2 of 3 of the second set (66.7%)", 0, "not reached"),
        ("sound", "4 of 5 of all networks (80.0%), 2 of 3 of the second set (66.7%)", 1, "not reached"),
    ],
)
def test_the_page_counts_right_verdicts_and_floors(of_second: str, right: str, trusted: int, aim: str) -> None:
    text = page(record(of_second))
    assert f"known what is right: {right}. Masked or random networks called sound: {trusted}." in text
    assert f"no such network called sound, is {aim}." in text
    assert "On 3 of 4 networks with a known floor, the worst case is within 2 points of it." in text
    assert "| invented loud | second | 90 | 70 | 30 | NO |" in text
    assert "| invented unknown | second | 30 | 10 | 30 | yes |" in text


def test_what_is_measured_so_far_is_collected_and_what_is_missing_named(tmp_path: Path) -> None:
    job = Job("trying", "pooled relu, staircase", tmp_path, tmp_path)
    for each, worst in ((job.honest(), 0.2), (job, 0.21)):
        each.folder.mkdir(parents=True)
        write_json(each.done, results(0.9, worst, "masked"))
    linear = {"name": "linear", "verdict": "sound"}
    before = {"setting": [], "trying": [linear, {"name": "pooled relu", "verdict": "measured anew"}]}
    found = collected(tmp_path, tmp_path, before)
    assert [one["name"] for one in found["trying"]] == ["linear", "pooled relu", "pooled relu, staircase"]
    assert [one["verdict"] for one in found["trying"]] == ["sound", "masked", "masked"]
    assert found["trying"][2]["floor"] == 0.2
    assert len(found["missing"]["trying"]) == len(SETS["trying"]) - 3
    assert found["missing"]["setting"] == [specimen.name for specimen in SETS["setting"]]
    text = page({**record("masked"), "missing": {"setting": [], "trying": ["one, disguised", "another"]}})
    assert text.endswith("\n\nNot measured yet: one, disguised; another.\n")
    assert "called sound, is open: 2 networks are not measured yet." in text


def test_no_false_trust_hides_in_a_high_share() -> None:
    found = record("masked")
    found["trying"] += [found["setting"][0]] * 97 + [{**found["setting"][1], "verdict": "sound"}]
    assert wrong(found["trying"][-1]) == "false trust"
    assert "(99.0%)" in page(found)
    assert "called sound, is not reached." in page(found)


def test_a_record_without_floors_has_no_section_about_them() -> None:
    found = record("masked")
    for of_set in found.values():
        of_set[:] = [{k: one[k] for k in one if k not in ("floor", "within")} for one in of_set]
    assert "## Known floors" not in page(found)


def name_and_threads(job: Job) -> tuple[str, int]:
    return job.name, torch.get_num_threads()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_jobs_run_in_processes_of_one_thread_and_keep_their_order(processes: int) -> None:
    threads = torch.get_num_threads()
    try:
        found = in_processes(name_and_threads, JOBS[:3], processes)
    finally:
        torch.set_num_threads(threads)
    assert found == [(job.name, 1) for job in JOBS[:3]]
