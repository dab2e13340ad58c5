"""Figures of runs: the numbers drawn are those computed by hand from made records."""

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from kwta_exp.attacks import Threat
from kwta_exp.cli import main
from kwta_exp.draw import checks, confusion, eps, passes, training
from kwta_exp.draw.groups import groups
from kwta_exp.draw.pages import figures_of
from kwta_exp.draw.style import COLOURS
from kwta_exp.errors import UserError
from kwta_exp.evaluation.results import wilson
from kwta_exp.evaluation.stored import Stored
from kwta_exp.examples import draw as draw_examples
from kwta_exp.plan import plan_to_judge
from kwta_exp.report.runs import Run
from kwta_exp.report.summary import over_seeds
from kwta_exp.sealed import read_arrays
from kwta_exp.storage import read_json, write_json, write_lines
from tests import stored
from tests.conftest import TINY
from tests.launched import launch
from tests.test_whole import only

N = 6
CORRECT = [True, True, True, True, True, False]
LABELS = [0, 0, 1, 1, 2, 2]  # the last image is taken for class 3


CHECK = {"value": 0.0, "threshold": 0.5, "source": "none", "bears_on": "worst case"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of :data:`N` images. PGD fools images 0 and 2; BPDA fools 0, 1 and 2."""
    folder = stored.described(tmp_path / "d-m-kwta-natural" / "s0-0123456789", "kwta", ratio=0.1)
    columns = {
        "clean": {"label": LABELS},
        "pgd": {"queries": [3, 40, 5, 40, 40], "steps": [2, 40, 4, 40, 40], "prediction": [1, 0, 2, 1, 2]},
        "bpda": {"queries": [1, 2, 2, 20, 20], "steps": [0, 1, 1, 20, 20], "prediction": [2, 2, 2, 1, 2]},
    }
    stored.evaluation(folder, "quick-x", CORRECT, {"pgd": [0, 2], "bpda": [0, 1, 2]}, columns=columns)
    return folder


def steps(rows: list[dict[str, Any]], attack: str) -> list[tuple[int, float]]:
    return [(row["passes"], row["accuracy"]) for row in rows if row["attack"] == attack]


def csv_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_attack_s_curve_falls_where_its_passes_fooled_an_image(run: Path) -> None:
    figure, rows = passes.draw(Stored.read(run))
    assert steps(rows, "pgd") == [(0, 5 / N), (5, 4 / N), (9, 3 / N), (80, 3 / N)]
    assert steps(rows, "bpda") == [(0, 5 / N), (1, 4 / N), (3, 2 / N), (40, 2 / N)]
    assert (rows[3]["low"], rows[3]["high"]) == wilson(3, N)
    assert {row["n"] for row in rows} == {N}
    (axis,) = figure.axes
    by_label = {str(line.get_label()): line for line in axis.lines}
    drawn = by_label["pgd: 50.0%"]
    assert list(np.asarray(drawn.get_xdata())[1:]) == [5, 9, 80]
    assert list(np.asarray(drawn.get_ydata())) == pytest.approx([500 / N, 400 / N, 50, 50])
    assert list(np.asarray(by_label["worst case: 33.3%"].get_ydata())) == pytest.approx([200 / N] * 2)


def test_an_attack_without_images_to_judge_has_a_flat_curve(tmp_path: Path) -> None:
    folder = stored.described(tmp_path / "d-m-relu-natural" / "s0-0123456789", "relu")
    stored.evaluation(folder, "quick-x", [False, False], {"pgd": []})
    assert steps(passes.rows(Stored.read(folder)), "pgd") == [(0, 0)]
    passes.draw(Stored.read(folder))


def test_checks_are_drawn_with_bound_and_threshold_and_raised_ones_marked() -> None:
    flag = {"check": "gain_over_plain_pgd", "value": 0.2, "lower95": 0.1, "threshold": 0.05}
    passed = {"check": "constant_output", "value": 0.0, "threshold": 0.5}
    results = {
        "run": {"name": "mine"}, "threat": {"norm": "linf", "eps": 0.1},
        "masking": {"verdict": "masked", "flags": [flag], "passed": [passed]},
    }  # fmt: skip
    figure, rows = checks.draw(results)
    assert rows == [flag | {"raised": True}, passed | {"lower95": None, "raised": False}]
    (axis,) = figure.axes
    points = [(*map(float, np.ravel(line.get_data())), line.get_marker()) for line in axis.lines[:5]]
    assert points == [
        (0.1, 0.2, 0, 0, "None"), (0.05, 0, "|"), (0.2, 0, "X"), (0.5, 1, "|"), (0.0, 1, "o"),
    ]  # fmt: skip
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["gain over plain pgd", "constant output"]


def test_the_worst_case_takes_the_class_of_the_attack_that_fooled_first(run: Path) -> None:
    read = Stored.read(run)
    assert confusion.predictions(read.outcome).tolist() == [1, 2, 2, 1, 2, 3]
    figure, rows = confusion.draw(read)
    assert [[row[f"as {other}"] for other in range(4)] for row in rows] == [
        [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0],
    ]  # fmt: skip
    assert [(row["n"], row["clean"], row["worst"]) for row in rows] == [
        (2, 1, 0), (2, 1, 0.5), (2, 0.5, 0.5), (0, None, None),
    ]  # fmt: skip
    assert (rows[1]["worst low"], rows[1]["worst high"]) == wilson(1, 2)
    shown = figure.axes[1].images[0].get_array()
    assert shown is not None
    assert shown.tolist() == [[0, 50, 50, 0], [0, 50, 50, 0], [0, 0, 50, 50], [0] * 4]


@pytest.mark.parametrize("kind", ["passes", "checks", "confusion"])
def test_a_command_writes_the_figure_of_a_run_or_of_one_of_its_evaluations(
    run: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (run / "results.json", run / "evaluation" / "quick-x" / "results.json"):
        results = read_json(path)
        results["masking"]["passed"] = [CHECK | {"check": name} for name in ("constant_output", "mine")]
        write_json(path, results)
    main(["draw", kind, str(run)])
    files = [run / "figures" / f"{kind}.{suffix}" for suffix in ("svg", "png", "csv")]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in files]
    first = [path.read_bytes() for path in files]
    main(["draw", kind, str(run / "evaluation" / "quick-x")])
    assert [path.read_bytes() for path in files] == first
    assert len(csv_of(files[2])) > 1


def test_what_no_attack_ran_on_cannot_be_drawn(tmp_path: Path, run: Path) -> None:
    folder = stored.described(tmp_path / "d-m-relu-natural" / "s0-0123456789", "relu")
    stored.evaluation(folder, "none-x", [True, False], {})
    for module in (passes, confusion):
        with pytest.raises(UserError, match="no attack ran"):
            module.draw(Stored.read(folder))
    with pytest.raises(UserError, match="made no checks"):
        checks.draw(Stored.read(folder).results)
    with pytest.raises(UserError, match="no finished evaluation"):
        Stored.read(tmp_path)


def trained(outputs: Path, activation: str, seed: int, epochs: list[dict[str, float]], **values: object) -> Run:
    """A run of three epochs or so."""
    amount = "".join(map(str, values.values()))
    folder = outputs / f"d-m-{activation}{amount}-natural" / f"s{seed}-0123456789"
    stored.described(folder, activation, seed, **values)
    write_lines(folder / "metrics.jsonl", [{"epoch": n + 1, **epoch} for n, epoch in enumerate(epochs)])
    return Run.read(folder)


def lines_of(axis: Any) -> dict[str, Any]:
    return {str(line.get_label()): line for line in axis.lines}


def test_one_run_s_accuracies_share_a_panel(tmp_path: Path) -> None:
    epochs = [
        {"loss": 2.0, "accuracy": 0.2, "val_accuracy": 0.3, "val_robust_accuracy": 0.1, "sparsity_ratio": 0.5},
        {"loss": 1.0, "accuracy": 0.6, "val_accuracy": 0.5, "val_robust_accuracy": 0.2, "sparsity_ratio": 0.3},
    ]
    figure, rows = training.draw([trained(tmp_path, "kwta", 0, epochs, ratio=0.3)])
    loss, accuracy, ratio = figure.axes
    assert list(lines_of(loss)["kwta"].get_ydata()) == [2, 1]
    drawn = {label: list(line.get_ydata()) for label, line in lines_of(accuracy).items()}
    assert drawn == {"training": [20, 60], "validation": [30, 50], "validation, attacked": [10, 20]}
    assert list(lines_of(ratio)["kwta"].get_ydata()) == [0.5, 0.3]
    assert {to_hex(line.get_color()) for axis in figure.axes for line in axis.lines} == {
        COLOURS["kwta"].lower()
    }
    assert [row["epoch"] for row in rows] == [1, 2]


def test_seeds_are_one_curve_with_an_interval_and_a_constant_ratio_is_left_out(tmp_path: Path) -> None:
    shares = (0.4, 0.6)
    runs = [
        trained(tmp_path, "kwta", seed, [{"loss": 1.0 + seed, "accuracy": share, "sparsity_ratio": 0.1}] * 2)
        for seed, share in enumerate(shares)
    ]
    runs.append(trained(tmp_path, "relu", 0, [{"loss": 0.5, "accuracy": 0.9}]))
    figure, rows = training.draw(runs)
    assert [(row["runs"], row["seeds"], row["epoch"]) for row in rows] == [
        ("kwta", 2, 1), ("kwta", 2, 2), ("relu", 1, 1),
    ]  # fmt: skip
    first = rows[0]
    assert (first["accuracy"], first["accuracy low"], first["accuracy high"]) == over_seeds(shares)
    assert (first["loss"], first["loss low"], first["loss high"]) == (1.5, 1, 2)
    loss, accuracy = figure.axes
    assert list(lines_of(accuracy)["kwta"].get_ydata()) == pytest.approx([50, 50])
    assert {label: to_hex(line.get_color()) for label, line in lines_of(loss).items()} == {
        "kwta": COLOURS["kwta"].lower(), "relu": COLOURS["relu"],
    }  # fmt: skip


def test_curves_are_named_by_what_tells_them_apart_and_look_different(tmp_path: Path) -> None:
    runs = [trained(tmp_path, "kwta", 0, [], ratio=ratio) for ratio in (0.1, 0.2)]
    runs += [trained(tmp_path, "relu", seed, []) for seed in (0, 1)]
    found = groups("training", runs)
    assert [(each.label, len(each.runs)) for each in found] == [
        ("kwta, ratio=0.1", 1), ("kwta, ratio=0.2", 1), ("relu", 2),
    ]  # fmt: skip
    assert len({(str(each.look["dashes"]), each.look["marker"]) for each in found}) == 3
    assert found[0].look["color"] == found[1].look["color"] == COLOURS["kwta"]
    apart = [each.label for each in groups("eps", runs, seeds_apart=True)]
    assert apart == ["kwta, ratio=0.1, seed=0", "kwta, ratio=0.2, seed=0", "relu, seed=0", "relu, seed=1"]
    with pytest.raises(UserError, match="expected at most 8"):
        groups("training", [trained(tmp_path, "kwta", 0, [], ratio=n / 10) for n in range(1, 10)])
    with pytest.raises(UserError, match="no runs to draw"):
        groups("training", [])


def test_accuracy_against_eps_counts_all_evaluations_up_to_it(tmp_path: Path) -> None:
    folder = stored.described(tmp_path / "d-m-kwta-natural" / "s0-0123456789", "kwta", ratio=0.1)
    for size, fooled in ((0.1, [0, 1]), (0.2, [2]), (0.3, [0, 1, 2, 3])):
        threat = Threat(norm="linf", eps=size)
        stored.evaluation(folder, f"quick-{size}", CORRECT, {"pgd": fooled}, threat=threat)
    figure, rows = eps.draw([Run.read(folder)])
    assert [(row["eps"], row["accuracy"]) for row in rows] == [
        (0, 5 / N), (0.1, 3 / N), (0.2, 2 / N), (0.3, 1 / N),
    ]  # fmt: skip
    assert [(row["low"], row["high"]) for row in rows] == [wilson(count, N) for count in (5, 3, 2, 1)]
    line = figure.axes[0].containers[0][0]
    assert list(line.get_xdata()) == [0, 0.1, 0.2, 0.3]
    assert list(line.get_ydata()) == pytest.approx([500 / N, 50, 200 / N, 100 / N])
    assert to_hex(line.get_color()) == COLOURS["kwta"].lower()


def test_curves_against_eps_of_different_norms_are_not_put_together(tmp_path: Path) -> None:
    runs = []
    for seed, norm in enumerate(("linf", "l2")):
        folder = stored.described(tmp_path / "d-m-relu-natural" / f"s{seed}-0123456789", "relu", seed)
        stored.evaluation(folder, "quick-x", CORRECT, {"pgd": [0]}, threat=Threat(norm=norm, eps=0.1))
        runs.append(Run.read(folder))
    with pytest.raises(UserError, match="differ in the threat's norm: l2, linf"):
        eps.draw(runs)


def test_runs_that_were_not_trained_have_no_training_curve(run: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        training.draw([Run.read(run)])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no epoch is finished"):
        training.draw([Run.read(run)])
    write_lines(run / "metrics.jsonl", [{"epoch": 1, "val_accuracy": 0.5}])
    _, rows = training.draw([Run.read(run)])
    assert rows[0]["val_accuracy"] == 0.5
    (run / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="checksum"):
        training.draw([Run.read(run)])


@pytest.fixture(scope="module")
def with_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that kept its adversarial images."""
    outputs = tmp_path_factory.mktemp("outputs")
    usual = [override for override in TINY if not override.startswith("attack")]
    pgd = ["+attack@attack.pgd=pgd", "attack.pgd.steps=10", "threat.eps=0.3"]
    launch(outputs, *usual, "suite=none", "evaluation.save_images=true", *pgd)
    return only(outputs, "*/s0-*")


def test_examples_are_the_saved_images_and_what_the_network_sees_in_them(with_images: Path) -> None:
    plan = plan_to_judge(with_images, [], None, False)
    figure, rows = draw_examples(plan, with_images, 2)
    read = Stored.read(with_images)
    columns = read.outcome.records["pgd"].columns
    fooled = np.flatnonzero(columns["fooled"])[:2]
    assert [row["index"] for row in rows] == columns["index"][fooled].tolist()
    assert [row["adversarial class"] for row in rows] == columns["prediction"][fooled].tolist()
    assert [row["clean class"] for row in rows] == [row["label"] for row in rows]
    assert {row["attack"] for row in rows} == {"pgd"}
    assert all(0 < row[f"{which} confidence"] <= 1 for row in rows for which in ("clean", "adversarial"))
    saved: dict[int, Any] = {}
    for path in (read.folder / "images").glob("*.npz"):
        arrays = read_arrays(path)
        saved |= dict(zip(arrays["index"].tolist(), arrays["x_adv"], strict=True))
    times = rows[0]["difference times"]
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    for column, row in enumerate(rows):
        clean, difference, adversarial = (np.asarray(shown[line * 2 + column]) for line in range(3))
        np.testing.assert_allclose(adversarial, saved[row["index"]][0], atol=1e-6)
        np.testing.assert_allclose(
            difference, np.clip(0.5 + times * (adversarial - clean), 0, 1), atol=1e-5 * times
        )


def test_the_command_draws_examples(with_images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["draw", "examples", str(with_images), "--images", "1"])
    assert capsys.readouterr().out.splitlines()[2] == str(with_images / "figures" / "examples.csv")
    assert len(csv_of(with_images / "figures" / "examples.csv")) == 1


def test_examples_need_saved_images_and_a_fooled_one(run: Path, with_images: Path) -> None:
    plan = plan_to_judge(with_images, [], None, False)
    with pytest.raises(UserError, match="has no adversarial images"):
        draw_examples(plan, run, 6)
    with pytest.raises(UserError, match="--images 0: expected 1 or more"):
        draw_examples(plan, run, 0)
    stored.evaluation(run, "quick-y", CORRECT, {"pgd": []})
    (run / "evaluation" / "quick-y" / "images").mkdir()
    with pytest.raises(UserError, match="no attack fooled an image"):
        draw_examples(plan, run, 6)


def test_the_page_of_a_run_shows_the_figures_that_apply(run: Path, with_images: Path) -> None:
    page = (with_images / "report.html").read_text()  # as the run wrote it
    assert re.findall(r"<figcaption>(.*?)\.", page) == [
        "Accuracy against passes",
        "Classes under attack",
        "Training",
    ]
    assert page.count('<figure style="width: 24.4rem">') == 3  # 3.3 inches
    ids = re.findall(r'(?<= id=")[^"]+', page)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert set(used) <= set(ids)
    main(["report", str(with_images), "-o", str(run / "again.html")])
    assert (run / "again.html").read_text() == page
    main(["report", str(run)])
    assert (run / "report.html").read_text().count("<figcaption>") == 2  # it has no metrics.jsonl


def test_a_damaged_or_missing_file_costs_its_figures_alone(run: Path) -> None:
    (run / "metrics.jsonl").write_text("{}\n")
    assert [figure.title for figure in figures_of(Run.read(run))] == [
        "Accuracy against passes", "Classes under attack",
    ]  # fmt: skip
    write_lines(run / "metrics.jsonl", [{"epoch": 1, "loss": 1.0, "accuracy": 0.5}])
    (run / "evaluation" / "quick-x" / "pgd.npz").write_bytes(b"damaged")
    assert [figure.title for figure in figures_of(Run.read(run))] == ["Training"]
    (run / "metrics.jsonl").unlink()
    main(["report", str(run)])
    assert "<figcaption>" not in (run / "report.html").read_text()


def test_names_are_text_in_a_figure(tmp_path: Path) -> None:
    folder = stored.described(tmp_path / "d-m-relu-natural" / "s0-0123456789", "relu")
    stored.evaluation(folder, "quick-x", [True, True], {"$_{$ --> <b>": [0]}, name=300 * "\u8776<b>")
    (first, _) = figures_of(Run.read(folder))
    assert "<b>" not in first.svg
    assert "$_{$" in first.svg
