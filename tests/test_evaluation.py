"""An evaluation judges every returned image, counts queries per image, and continues after a stop."""

import io
import multiprocessing.util
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

from kwta_exp.activations import KWTA
from kwta_exp.attacks import (
    APGD,
    PGD,
    EvolutionStrategies,
    NotApplicableError,
    RelaxedTransfer,
    SmoothedPGD,
    Threat,
    as_attack,
)
from kwta_exp.data.batches import Split, first_test_images, to_float
from kwta_exp.data.datasets import Digits
from kwta_exp.errors import UserError
from kwta_exp.evaluation import Evaluation, summarise
from kwta_exp.evaluation.judge import Judge
from kwta_exp.evaluation.query_counter import QueryCounter
from kwta_exp.evaluation.records import Record
from kwta_exp.report.terminal import results_table
from kwta_exp.sealed import read_arrays
from tests.launched import time_limit

THREAT = Threat(norm="linf", eps=0.1)
RUN = {"name": "test", "seed": 0}


class Threshold(nn.Module):
    """Predicts class 1 where the mean pixel exceeds 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return torch.stack([torch.full_like(mean, 0.5), mean], dim=1)


def images(*means: float, labels: list[int] | None = None) -> Split:
    """One grey 2x2 image for each mean; by default with the labels that :class:`Threshold` predicts."""
    x = torch.tensor(means)[:, None, None, None].expand(-1, 1, 2, 2).mul(255).round().to(torch.uint8)
    y = torch.tensor(labels) if labels else (x[:, 0, 0, 0] > 127).long()
    return Split(x.contiguous(), y, torch.arange(len(means)) + 100)


def shift(by: float) -> Any:
    return lambda model, x, y, keys: x + by


def judge(folder: Path, split: Split, suite: dict[str, Any], model: nn.Module | None = None, **kw: Any) -> Any:
    settings = {"threat": THREAT, "batch_size": 2, **kw}
    attacks = {name: as_attack(attack, settings["threat"]) for name, attack in suite.items()}
    evaluation = Evaluation(model or Threshold(), split, attacks, folder=folder, **settings)
    outcome = evaluation.run()
    return outcome.clean, outcome.records, summarise(RUN, evaluation, outcome)


def test_the_worst_case_is_per_image_and_not_the_minimum_of_averages(tmp_path: Path) -> None:
    split = images(0.45, 0.55, 0.8, 0.2)
    _, records, results = judge(tmp_path, split, {"up": shift(0.09), "down": shift(-0.09)})
    # Each attack alone fools one image of four; together they fool two.
    assert records["up"].columns["fooled"].tolist() == [True, False, False, False]
    assert records["down"].columns["fooled"].tolist() == [False, True, False, False]
    assert [results["attacks"][name]["robust_accuracy"] for name in ("up", "down")] == [0.75, 0.75]
    assert [results["attacks"][name]["cumulative"] for name in ("up", "down")] == [0.75, 0.5]
    assert results["worst_case"]["robust_accuracy"] == 0.5
    assert results["worst_case"]["by"] == {"up": 0.25, "down": 0.25}


def test_a_misclassified_clean_image_is_not_robust_and_not_attacked(tmp_path: Path) -> None:
    split = images(0.8, 0.8, 0.8, labels=[1, 0, 1])
    clean, records, results = judge(tmp_path, split, {"nothing": shift(0.0)})
    assert clean.columns["prediction"].tolist() == [1, 1, 1]
    assert records["nothing"].columns["index"].tolist() == [100, 102]
    assert results["clean"]["accuracy"] == results["worst_case"]["robust_accuracy"] == pytest.approx(2 / 3)
    assert results["attacks"]["nothing"]["n"] == 3


@pytest.mark.parametrize("norm_name", ["linf", "l2"])
def test_images_outside_the_ball_are_projected(tmp_path: Path, norm_name: Any) -> None:
    threat = Threat(norm=norm_name, eps=0.1)
    split = images(0.8, 0.2)
    _, records, results = judge(tmp_path, split, {"cheat": lambda m, x, y, k: 1 - x}, threat=threat)
    assert results["worst_case"]["robust_accuracy"] == 1
    np.testing.assert_allclose(records["cheat"].columns["distance"], 0.1, atol=1e-6)
    _, records, results = judge(tmp_path / "b", images(0.55), {"far": shift(-9.0)}, threat=THREAT)
    assert results["worst_case"]["robust_accuracy"] == 0


def test_nan_pixels_are_replaced_and_nan_logits_are_misclassifications(tmp_path: Path) -> None:
    split = images(0.8, 0.2)
    for value in ("nan", "inf", "-inf"):
        for norm_name in ("linf", "l2"):
            threat = Threat(norm=norm_name, eps=0.1)  # type: ignore[arg-type]
            suite = {"bad": lambda m, x, y, k, value=value: torch.full_like(x, float(value))}
            _, records, _ = judge(tmp_path / (value + norm_name), split, suite, threat=threat)
            assert records["bad"].columns["distance"].tolist() == [0, 0]
            assert not records["bad"].columns["fooled"].any()

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 2), float("nan"))

    clean, _, results = judge(tmp_path / "b", split, {}, Broken())
    assert clean.columns["prediction"].tolist() == [-1, -1]
    assert results["clean"]["accuracy"] == 0


def test_margins_and_digests_identify_each_image(tmp_path: Path) -> None:
    split = images(0.8, 0.2)
    clean, records, _ = judge(tmp_path, split, {"up": shift(0.05)})
    np.testing.assert_allclose(clean.columns["margin"], [-0.3, -0.3], atol=1e-6)
    np.testing.assert_allclose(records["up"].columns["margin"], [-0.35, -0.25], atol=1e-6)
    assert clean.columns["digest"].dtype == np.dtype("S16")
    assert len(set(clean.columns["digest"].tolist())) == 2
    assert records["up"].columns["digest"].tolist() == clean.columns["digest"].tolist()


def test_confidence_intervals_are_wilsons(tmp_path: Path) -> None:
    _, _, results = judge(tmp_path, images(*[0.8] * 9, 0.2, labels=[1] * 10), {})
    p, n, z = 0.9, 10, norm.ppf(0.975)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert results["clean"]["ci95"] == pytest.approx([centre - half, centre + half])
    assert results["worst_case"] is None
    assert results["masking"]["verdict"] == "untested"


class Stopped(Exception):  # noqa: N818
    pass


def random_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.mark.parametrize("calls", [1, 2, 5, 8])
def test_a_stopped_evaluation_continues_to_the_same_rows(tmp_path: Path, calls: int) -> None:
    model = random_net()
    split = images(*torch.rand(43, generator=torch.Generator().manual_seed(0)).tolist(), labels=[0] * 43)
    split = Split(split.x, model(split.x / 255).argmax(1), split.index)
    attacks = {"a": PGD(norm="linf", eps=0.1, steps=3), "b": PGD(norm="linf", eps=0.1, steps=4, restarts=2)}
    _, whole, _ = judge(tmp_path / "whole", split, attacks, model)

    remaining = calls

    class StopsAfterCalls(PGD):
        def __call__(self, *arguments: Any) -> Tensor:
            nonlocal remaining
            remaining -= 1
            if remaining < 0:
                raise Stopped
            return super().__call__(*arguments)

    def stopping(attack: PGD) -> PGD:
        return StopsAfterCalls(norm="linf", eps=0.1, steps=attack.steps, restarts=attack.restarts)

    stops = 0
    while True:
        try:
            remaining = calls
            suite = {name: stopping(attack) for name, attack in attacks.items()}
            _, pieces, _ = judge(tmp_path / "pieces", split, suite, model)
            break
        except Stopped:
            stops += 1
    assert stops == (12 - 1) // calls  # six chunks an attack, of four batches each
    for name in attacks:
        for column, values in whole[name].columns.items():
            np.testing.assert_array_equal(values, pieces[name].columns[column])
        assert whole[name].forwards == pieces[name].forwards > 0


def test_chunks_do_not_share_random_streams_and_seeds_matter(tmp_path: Path) -> None:
    received: list[Tensor] = []

    def spy(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        received.append(keys)
        return x

    split = images(0.8, 0.2, 0.7)
    judge(tmp_path / "a", split, {"one": spy, "two": spy})
    judge(tmp_path / "b", split, {"one": spy}, seed=1)
    assert len(set(torch.cat(received).tolist())) == 9


def test_attacks_that_use_global_generators_are_reproducible(tmp_path: Path) -> None:
    def noisy(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        return x + 0.05 * torch.rand_like(x) * float(np.random.rand())

    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    rows = [
        judge(tmp_path / name, images(0.8, 0.2, 0.7), {"noisy": noisy})[1]["noisy"].columns for name in "ab"
    ]
    np.testing.assert_array_equal(rows[0]["distance"], rows[1]["distance"])
    assert len(set(rows[0]["distance"].tolist())) == 3
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_records_of_other_images_are_renamed(tmp_path: Path) -> None:
    judge(tmp_path, images(0.8, 0.2), {})
    split = images(0.8, 0.2)
    clean, _, _ = judge(tmp_path, Split(split.x, split.y, split.index + 1), {})
    assert clean.columns["index"].tolist() == [101, 102]
    assert len(list(tmp_path.glob("clean.npz.damaged-*"))) == 1


@pytest.mark.parametrize("saved", ["up-0", "down-0"])
def test_an_attack_whose_saved_images_are_damaged_runs_again(tmp_path: Path, saved: str) -> None:
    split, suite = images(0.45, 0.55, 0.8), {"up": shift(0.09), "down": shift(-0.09)}
    _, before, _ = judge(tmp_path, split, suite, save_images=True)
    path = tmp_path / "images" / f"{saved}.npz"
    undamaged = read_arrays(path)
    path.write_bytes(path.read_bytes()[:-9])
    _, after, _ = judge(tmp_path, split, suite, save_images=True)
    assert {name: array.tolist() for name, array in read_arrays(path).items()} == {
        name: array.tolist() for name, array in undamaged.items()
    }
    for name in suite:
        assert after[name].columns["fooled"].tolist() == before[name].columns["fooled"].tolist()
    assert [found.name.split("-")[0] for found in tmp_path.glob("*.damaged-*")] == [
        f"{saved.split('-')[0]}.npz.damaged"
    ]


def test_the_query_counter_counts_all_passes() -> None:
    x = torch.rand(5, 1, 2, 2)
    network = random_net()
    model = QueryCounter(network, x, network(x).argmax(1), THREAT)
    PGD(norm="linf", eps=1e-6, steps=4)(model, x, network(x).argmax(1), torch.arange(5))
    assert (model.forwards, model.backwards) == (25, 20)
    assert model.queries.tolist() == [5] * 5
    assert model.steps.tolist() == [4] * 5
    model(x[:2].requires_grad_()).sum().backward()
    assert (model.forwards, model.backwards) == (27, 22)
    assert model.queries.tolist() == [6, 6, 5, 5, 5]


@pytest.mark.parametrize("norm_name", ["linf", "l2"])
def test_the_query_counter_counts_per_image_until_it_is_fooled(norm_name: Any) -> None:
    x = torch.tensor([0.2, 0.45, 0.9])[:, None, None, None].expand(-1, 1, 2, 2).clone()
    threat = Threat(norm=norm_name, eps=0.1 if norm_name == "linf" else 0.2)
    model = QueryCounter(Threshold(), x, torch.tensor([0, 0, 1]), threat)
    model(x)
    model(torch.cat([x[2:], x[1:2], x[1:2] + 0.15]))  # dropped, reordered, repeated; an error outside the ball
    assert model.queries.tolist() == [1, 3, 2]
    fooling = (x[1:2] + 0.08).requires_grad_()
    model(fooling).sum().backward()  # a gradient after the success does not count
    assert model.queries.tolist() == [1, 4, 2]
    assert model.steps.tolist() == [0, 0, 0]
    model(x.clone().requires_grad_()).sum().backward()
    assert model.queries.tolist() == [2, 4, 3]
    assert model.steps.tolist() == [1, 0, 1]
    model(x[:0])
    assert (model.forwards, model.backwards) == (10, 4)


@pytest.mark.parametrize("norm_name", ["linf", "l2"])
def test_queries_near_their_images_need_no_matrix_of_distances(
    norm_name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.rand(128, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = QueryCounter(nn.Flatten(), x, x.flatten(1).argmax(1), Threat(norm=norm_name, eps=0.01))
    sizes: list[tuple[int, int]] = []

    def counting(a: Tensor, b: Tensor, **rest: Any) -> Tensor:
        sizes.append((len(a), len(b)))
        return distances(a, b, **rest)

    distances = torch.cdist
    monkeypatch.setattr(torch, "cdist", counting)
    for _ in range(5):
        model(x + 0.005)
    assert sizes == []
    for part in (*x.split(64), *x.split(64), *x.split(64)):
        model(part - 0.005)
    assert [n for n, _ in sizes if n > 1] == [64, 64]  # one for each half, when it is first seen
    assert model.queries.tolist() == [5 + 3] * 128


@pytest.mark.parametrize("attack", [lambda m, x, y, k: x[:1], lambda m, x, y, k: None, lambda m, x: x])
def test_the_error_of_a_failing_attack_names_it(tmp_path: Path, attack: Any) -> None:
    with pytest.raises(UserError, match=r"attack\.mine: (ValueError|TypeError)"):
        judge(tmp_path, images(0.8, 0.2), {"mine": attack})


def test_the_results_table_fits_80_columns(tmp_path: Path) -> None:
    _, _, results = judge(
        tmp_path, images(0.45, 0.55, 0.8, 0.2), {"up": shift(0.09), "projected_gradient": shift(0)}
    )
    text = results_table(results, width=80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    for expected in ("none (clean)", "100.0%", "up", "75.0%", "worst case", "UNTESTED", "30.1 .. 95.4"):
        assert expected in text, text


def test_the_results_table_of_long_names_and_large_numbers_fits_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, results = judge(tmp_path, images(0.45, 0.55, 0.8, 0.2), {"bpda_apgd": shift(0.09)})
    results["attacks"]["bpda_apgd"] |= {
        "n": 10_000, "ci95": [0.998, 1.0], "forwards": 123_456_788, "backwards": 1, "seconds": 99_999.9,
    }  # fmt: skip
    results["attacks"]["an_own_attack_of_a_very_long_name"] = results["attacks"]["bpda_apgd"]
    results["inapplicable"] = {"another": "for a reason"}
    for encoding, line in (("utf-8", "────"), ("ascii", "----")):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        text = results_table(results, width=80)
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        assert line in text
        headings = text.splitlines()[1].split()
        assert headings == ["attack", "accuracy", "95%", "interval", "n", "cumulative", "passes", "seconds"]
        assert "123,456,789" in text
    text.encode("ascii")


def test_an_inapplicable_attack_is_recorded_not_scored(tmp_path: Path) -> None:
    def refuse(*_: object) -> Tensor:
        raise NotApplicableError("no such layer")

    _, records, results = judge(tmp_path, images(0.8, 0.2, 0.7), {"sideways": refuse, "down": shift(-0.05)})
    assert list(records) == list(results["attacks"]) == ["down"]
    assert results["inapplicable"] == {"sideways": "no such layer"}
    assert "n/a" in results_table(results)


def test_records_append_whole_chunks(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.npz")
    assert len(record) == 0
    for chunk in (np.arange(3), np.arange(3, 5)):
        record.append({"index": chunk}, forwards=2, backwards=1, seconds=0.5)
        record.save()
    again = Record.read(tmp_path / "r.npz", {"index": "i"})
    assert again.columns["index"].tolist() == [0, 1, 2, 3, 4]
    assert (again.forwards, again.backwards, again.seconds) == (4, 2, 1.0)


class Flicker(nn.Module):
    """Misclassifies a bright image in a batch in float32, but not alone, and not in float64."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        wrong = (mean > 0.5) & (len(x) > 1) & (x.dtype == torch.float32)
        return torch.stack([torch.zeros_like(mean), torch.where(wrong, 1.0, -1.0).to(mean)], dim=1)


def test_an_unconfirmed_misclassification_does_not_count_as_fooled(tmp_path: Path) -> None:
    split = images(0.45, 0.46, labels=[0, 0])
    _, records, results = judge(tmp_path, split, {"up": shift(0.09)}, model=Flicker())
    assert records["up"].columns["prediction"].tolist() == [1, 1]
    assert records["up"].columns["fooled"].tolist() == [False, False]
    assert records["up"].columns["unconfirmed"].tolist() == [True, True]
    assert results["worst_case"]["robust_accuracy"] == 1


class Float32Only(nn.Module):
    """A :class:`Threshold` that does not run in float64."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("float32 only")
        return Threshold()(x)


def test_misclassifications_of_float32_networks_are_confirmed(tmp_path: Path) -> None:
    split = images(0.45, 0.8)
    _, records, _ = judge(tmp_path, split, {"up": shift(0.09)}, model=Float32Only())
    assert records["up"].columns["fooled"].tolist() == [True, False]
    assert not records["up"].columns["unconfirmed"].any()


def test_beyond_the_diagnostic_images_an_attack_sees_only_robust_ones(tmp_path: Path) -> None:
    split = images(0.45, 0.55, 0.46, 0.54, 0.2)
    suite = {"up": shift(0.09), "down": shift(-0.09), "up_again": shift(0.09)}
    _, records, results = judge(tmp_path, split, suite, diagnostic_n=2)
    seen = {name: (record.columns["index"] - 100).tolist() for name, record in records.items()}
    assert seen == {"up": [0, 1, 2, 3, 4], "down": [0, 1, 3, 4], "up_again": [0, 1, 4]}
    assert [results["attacks"][name]["n"] for name in suite] == [2, 2, 2]
    assert [results["attacks"][name]["robust_accuracy"] for name in suite] == [0.5, 0.5, 0.5]
    assert [results["attacks"][name]["cumulative"] for name in suite] == [0.6, 0.2, 0.2]
    assert results["worst_case"] == {**results["worst_case"], "robust_accuracy": 0.2, "n": 5}
    assert results["worst_case"]["by"] == {"up": 0.4, "down": 0.4, "up_again": 0.0}
    everything = judge(tmp_path / "all", split, suite)[2]
    assert everything["worst_case"] == results["worst_case"]


def test_adversarial_images_are_saved(tmp_path: Path) -> None:
    split = images(0.45, 0.55, 0.8)
    judge(tmp_path, split, {"up": shift(0.5)}, save_images=True)
    files = sorted((tmp_path / "images").glob("*.npz"))
    assert [path.name for path in files] == ["up-0.npz", "up-2.npz"]
    with np.load(files[0]) as file:
        assert file["index"].tolist() == [100, 101]
        np.testing.assert_allclose(file["x_adv"], split.x[:2] / 255 + 0.1, atol=1e-6)


class Importable(nn.Module):
    """A network whose class a worker process must import."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = random_net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits


def not_applicable(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
    raise NotApplicableError("no such layer")


def grey(model: nn.Module, n: int) -> Split:
    split = images(*torch.rand(n, generator=torch.Generator().manual_seed(0)).tolist(), labels=[0] * n)
    return Split(split.x, model(split.x / 255).argmax(1), split.index)


def test_two_processes_give_the_same_results_as_one(tmp_path: Path) -> None:
    model = Importable()
    split = grey(model, 11)
    suite = {"a": PGD(norm="linf", eps=0.1, steps=3), "no": not_applicable, "b": APGD(norm="linf", eps=0.1)}
    _, one, of_one = judge(tmp_path / "one", split, suite, model)
    _, two, of_two = judge(tmp_path / "two", split, suite, model, processes=2)
    for name in ("a", "b"):
        for column, values in one[name].columns.items():
            np.testing.assert_array_equal(values, two[name].columns[column])
        assert one[name].forwards == two[name].forwards > 0
    assert of_one["inapplicable"] == of_two["inapplicable"] == {"no": "no such layer"}


def test_an_attack_that_cannot_be_pickled_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.processes: .* cannot be pickled .* expected 1"):
        judge(tmp_path, images(*[0.8] * 5), {"mine": lambda m, x, y, k: x}, processes=2)


def failing(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
    os._exit(3)


def test_a_process_that_dies_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.processes=2: a process died"):
        judge(tmp_path, grey(Importable(), 5), {"mine": failing}, Importable(), processes=2)


class Large(Importable):
    """Does not fit in the buffer of a pipe."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unused", torch.zeros(1 << 20))


def test_a_process_that_dies_while_it_starts_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent must not wait for it to read what it is sent."""
    start: Any = multiprocessing.util.spawnv_passfds
    killed: list[int] = []

    def start_and_kill(path: bytes, arguments: Any, descriptors: Any) -> int:
        pid: int = start(path, arguments, descriptors)
        if "--multiprocessing-fork" in map(os.fsdecode, arguments):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return pid

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", start_and_kill)
    suite = {"a": PGD(norm="linf", eps=0.1, steps=3)}
    with time_limit(60, "the parent"), pytest.raises(UserError, match=r"processes=2: a process died"):
        judge(tmp_path, grey(Large(), 11), suite, Large(), processes=2)
    assert killed


def test_attacks_beyond_the_budget_are_left_out(tmp_path: Path) -> None:
    suite = {
        "small": PGD(norm="linf", eps=0.1, steps=3),  # 4 forward, 3 backward
        "large": PGD(norm="linf", eps=0.1, steps=300),
        "unknown": shift(0.0),
        "last": PGD(norm="linf", eps=0.1, steps=2),  # 3 and 2
    }
    split = images(0.8, 0.2)
    _, records, results = judge(tmp_path, split, suite, budget=2 * (7 + 5))
    assert list(records) == ["small", "unknown", "last"]
    reason = "left out: up to 1,202 passes, of which evaluation.budget=24 leaves 10"
    assert results["inapplicable"]["large"] == reason
    assert list(judge(tmp_path / "b", split, suite, budget=2 * (7 + 5) - 1)[1]) == ["small", "unknown"]


def test_the_cost_of_a_long_suite_is_logged_before_it_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = {"small": PGD(norm="linf", eps=0.1, steps=3), "mine": shift(0.0)}
    with caplog.at_level("INFO"):
        judge(tmp_path / "a", images(0.8, 0.2), suite)
        assert "passes" not in caplog.text
        monkeypatch.setattr("kwta_exp.evaluation.forecast.MIN_SECONDS", 0.0)
        judge(tmp_path / "b", images(0.8, 0.2), suite)
    assert "attacking 2 images: at most 8 forward and 6 backward passes" in caplog.text
    assert "no forecast for mine" in caplog.text


def test_the_judge_pads_every_batch_to_the_same_size() -> None:
    sizes: list[int] = []

    class Watched(Threshold):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    x = torch.rand(7, 1, 2, 2)
    logits = Judge(Watched(), batch_size=3).logits(x)
    assert sizes == [3, 3, 3]
    torch.testing.assert_close(logits, Threshold()(x))


class InDouble(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x.double())
        return logits


def trained_on_digits(activation: nn.Module, n: int = 200) -> tuple[nn.Module, Split]:
    data = Digits().load()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), activation, nn.Linear(100, 10))
    x, y = to_float(torch.as_tensor(data.x_train)), torch.as_tensor(data.y_train)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval().requires_grad_(False), first_test_images(data, n, torch.device("cpu"))


CHUNKED = {
    "pgd": PGD(norm="linf", eps=0.1, steps=10, restarts=2),
    "apgd": APGD(norm="linf", eps=0.1, steps=20),
    "smoothed": SmoothedPGD(norm="linf", eps=0.1, steps=5, samples=3),
    "es": EvolutionStrategies(norm="linf", eps=0.1, steps=5, samples=20),
}


@pytest.mark.parametrize("activation", [nn.ReLU(), KWTA(0.1)], ids=["relu", "kwta"])
def test_batch_size_does_not_change_outcomes_in_float64(activation: nn.Module, tmp_path: Path) -> None:
    """In float32 rounding depends on the batch, and discontinuities amplify it."""
    network, split = trained_on_digits(activation, 60)
    model = InDouble(network)
    found = [judge(tmp_path / str(size), split, CHUNKED, model, batch_size=size)[1] for size in (60, 7)]
    for name in CHUNKED:
        assert 0 < found[0][name].columns["fooled"].sum() < len(found[0][name])
        for other in found[1:]:
            for column in ("index", "fooled", "prediction", "steps", "key"):
                np.testing.assert_array_equal(other[name].columns[column], found[0][name].columns[column])
            np.testing.assert_allclose(other[name].columns["distance"], found[0][name].columns["distance"])


def test_an_attack_that_becomes_inapplicable_midway_leaves_no_files(tmp_path: Path) -> None:
    """Its earlier chunks are discarded, and the other attacks run on all images."""
    calls = 0

    def inapplicable_later(model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise NotApplicableError("no more")
        return x + 0.09

    split = images(0.45, 0.46, 0.47, 0.2)
    suite = {"fickle": inapplicable_later, "up": shift(0.09)}
    _, records, results = judge(tmp_path, split, suite, diagnostic_n=1, save_images=True)
    assert list(records) == ["up"]
    assert records["up"].columns["index"].tolist() == [100, 101, 102, 103]
    assert results["worst_case"]["robust_accuracy"] == 0.25
    assert not list(tmp_path.glob("**/fickle*"))


def test_a_stochastic_network_is_judged_reproducibly(tmp_path: Path) -> None:
    class Stochastic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Threshold()(x + 0.2 * torch.randn_like(x))

    split = images(*torch.linspace(0.1, 0.9, 30).tolist())
    rows = []
    for name in "ab":
        torch.rand(len(rows) + 1)  # another state of the global generator
        clean, records, _ = judge(tmp_path / name, split, {"up": shift(0.05)}, Stochastic())
        rows.append((clean.columns["margin"].tolist(), records["up"].columns["margin"].tolist()))
    assert rows[0] == rows[1]


def test_passes_of_a_relaxed_network_count_but_its_misclassifications_do_not(tmp_path: Path) -> None:
    model, split = trained_on_digits(KWTA(0.1))
    attack = RelaxedTransfer(norm="linf", eps=0.1, steps=5, restarts=2, temperatures=[3.0])
    _, records, _ = judge(tmp_path, split, {"relaxed_transfer": attack}, model, batch_size=200)
    rows = records["relaxed_transfer"].columns
    assert (~rows["fooled"]).any()
    assert rows["steps"][~rows["fooled"]].tolist() == [10] * int((~rows["fooled"]).sum())


def test_the_error_of_an_attack_that_needs_more_classes_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"attack\.dlr: IndexError"):
        judge(tmp_path, images(0.8, 0.2), {"dlr": PGD(norm="linf", eps=0.1, loss="dlr")})
