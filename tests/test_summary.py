"""Many runs as a list and as one table: what varies, means and intervals over seeds, paired differences."""

import csv
import io
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from kwta_exp.attacks import Threat
from kwta_exp.attempts import attempt, lock_of
from kwta_exp.errors import UserError
from kwta_exp.report import paired
from kwta_exp.report.listing import listing
from kwta_exp.report.runs import Run, find, selected, varying
from kwta_exp.report.summary import measured, over_seeds, pivot, tables
from kwta_exp.report.tabular import FORMATS
from kwta_exp.storage import write_json
from tests import stored

N = 20


def made(outputs: Path, activation: str, seed: int, fooled: int, **values: object) -> Path:
    """A finished run whose attack fools the first ``fooled`` of :data:`N` images."""
    amount = "".join(map(str, values.values()))
    run = outputs / f"d-m-{activation}{amount}-natural" / f"s{seed}-0123456789"
    stored.described(run, activation, seed, **values)
    stored.evaluation(run, "quick-x", [True] * N, {"pgd": range(fooled)}, seed=seed)
    return run


@pytest.fixture(scope="module")
def five_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three settings; k-WTA with two seeds each."""
    outputs = tmp_path_factory.mktemp("five")
    for seed in (0, 1):
        made(outputs, "kwta", seed, 4 + 2 * seed, ratio=0.1)
        made(outputs, "kwta", seed, 6 + 2 * seed, ratio=0.2)
    made(outputs, "relu", 0, 14)
    return outputs


@pytest.fixture
def outputs(five_runs: Path, tmp_path: Path) -> Path:
    """A copy of these runs."""
    shutil.copytree(five_runs, tmp_path, dirs_exist_ok=True)
    return tmp_path


def runs(*roots: Path) -> list[Run]:
    return [Run.read(folder) for folder in find(roots)]


def test_only_keys_that_vary_are_columns(outputs: Path) -> None:
    assert varying(runs(outputs)) == ["activation", "activation.ratio", "seed"]
    assert varying(selected(runs(outputs), "kwta", [])) == ["activation.ratio", "seed"]
    assert varying(selected(runs(outputs), None, ["activation.ratio=0.1", "seed=0"])) == []


def test_runs_are_selected_by_pattern_and_value(outputs: Path) -> None:
    found = runs(outputs)
    assert [run.name for run in selected(found, "relu", [])] == ["d-m-relu-natural/s0-0123456789"]
    assert len(selected(found, "*kwta0.?-natural/s0*", [])) == 2
    assert len(selected(found, None, ["activation.ratio=0.1,0.2", "seed=1"])) == 2
    assert selected(found, None, ["seed=7"]) == []
    with pytest.raises(UserError, match=r"activation.ration: no run has this key.*activation.ratio"):
        selected(found, None, ["activation.ration=0.1"])
    with pytest.raises(UserError, match="expected KEY=VALUE"):
        selected(found, None, ["activation"])


def test_runs_are_found_at_any_depth_but_not_set_aside_or_through_links(outputs: Path) -> None:
    run = next(outputs.glob("*relu*/s0*"))
    shutil.copytree(run, run.with_name(f"{run.name}-before-20260101-000000"))
    (outputs / "link").symlink_to(run.parent)
    assert len(find([outputs])) == 5
    assert find([run]) == [run]
    assert find([run, run.parent]) == [run]
    with pytest.raises(UserError, match="no such folder"):
        find([outputs / "absent"])


def test_states_are_told_apart(outputs: Path) -> None:
    first, second, third, fourth, fifth = find([outputs])
    (second / "results.json").unlink()
    with pytest.raises(ValueError, match="boom"), attempt(third, "python run.py"):
        raise ValueError("first line\nboom")
    (fourth / "config.yaml").write_text("seed: 3\n")
    with pytest.raises(KeyboardInterrupt), attempt(fifth, "python run.py"):
        raise KeyboardInterrupt
    found = {run.folder: run for run in runs(outputs)}
    states = [found[folder].state for folder in (first, second, third, fourth, fifth)]
    assert states == ["finished", "interrupted", "failed", "damaged", "interrupted"]
    assert found[third].cause == "boom"
    assert "config.yaml: damaged" in found[fourth].cause
    text = listing(list(found.values()))
    assert "5 runs: 1 finished, 2 interrupted, 1 failed, 1 damaged" in text
    assert "boom" in text


def test_a_run_that_holds_its_lock_is_running(outputs: Path) -> None:
    from filelock import FileLock

    folder = find([outputs])[0]
    with FileLock(lock_of(folder)):
        assert Run.read(folder).state == "running"
    assert Run.read(folder).state == "finished"


def test_a_run_that_was_killed_and_then_finished_is_finished(outputs: Path) -> None:
    folder = find([outputs])[0]
    for seconds in (2, 3):
        with attempt(folder, f"python run.py {seconds}"):
            pass
    run = Run.read(folder)
    assert (run.state, run.seconds is not None) == ("finished", True)


def test_seeds_become_a_mean_with_students_interval(outputs: Path) -> None:
    (table,) = tables(measured(runs(outputs)))
    assert table.title == f"suite quick, linf eps 0.1, n = {N}"
    assert table.columns == ["activation", "activation.ratio", "seeds", "clean", "pgd", "worst case", "verdict"]
    row = next(values for values in table.values if values["activation.ratio"] == "0.1")
    shares = [16 / N, 14 / N]
    low, high = stats.t.interval(0.95, 1, np.mean(shares), stats.sem(shares))
    assert row["worst case"] == pytest.approx(0.75)
    assert row["worst case low"] == pytest.approx(max(0, low))
    assert row["worst case high"] == pytest.approx(min(1, high))
    assert row["seeds"] == 2
    alone = next(values for values in table.values if values["activation"] == "relu")
    wilson = stats.binomtest(6, N).proportion_ci(0.95, method="wilson")
    assert (alone["worst case low"], alone["worst case high"]) == pytest.approx((wilson.low, wilson.high))
    assert alone["activation.ratio"] == ""


def test_three_seeds_by_the_textbook() -> None:
    mean, low, high = over_seeds([0.4, 0.5, 0.6])
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_evaluations_that_measured_something_else_are_not_mixed(outputs: Path) -> None:
    run = find([outputs])[0]
    stored.evaluation(run, "quick-y", [True] * N, {"pgd": range(9)}, threat=Threat(norm="l2", eps=0.5))
    other = stored.evaluation(run, "quick-z", [True] * N, {"pgd": range(9)})
    settings = {"identity": {"attacks": [["pgd", {"steps": 99}]], "batch_size": 10}}
    write_json(run / "evaluation" / "quick-z" / "evaluation.json", settings)
    assert other["run"]["suite"] == "quick"
    found = tables(measured(runs(outputs)))
    assert [len(table.rows) for table in found] == [3, 1, 1]
    assert "3 kinds of evaluations" in found[0].notes[0]


def test_differences_are_paired_image_by_image(outputs: Path) -> None:
    (table,) = tables(measured(runs(outputs)), ["activation=relu"])
    values = {row["activation.ratio"]: row for row in table.values}
    assert values[""]["difference"] is None
    assert values["0.1"]["difference"] == pytest.approx(0.75 - 0.3)
    images = np.arange(N)
    relu = (images >= 14).astype(float)
    expected = {}
    for ratio, fooled in (("0.1", (4, 6)), ("0.2", (6, 8))):
        kwta = np.mean([(images >= number).astype(float) for number in fooled], axis=0)
        expected[ratio] = stats.ttest_1samp(kwta - relu, 0).pvalue
    smaller, larger = sorted(expected.values())
    corrected = {smaller: 2 * smaller, larger: max(2 * smaller, larger)}
    for ratio, p in expected.items():
        assert values[ratio]["p"] == pytest.approx(corrected[p])
    with pytest.raises(UserError, match="2 rows of this table match"):
        tables(measured(runs(outputs)), ["activation=kwta"])


def test_one_seed_each_is_mcnemars_test() -> None:
    robust, base = np.ones((1, 30)), np.ones((1, 30))
    robust[0, :2], base[0, 10:20] = 0, 0
    assert paired.p_value(robust, base) == pytest.approx(stats.binomtest(10, 12).pvalue)
    assert paired.p_value(base, base) == 1.0


def test_holm_by_hand() -> None:
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.6, 0.7]) == [1.0, 1.0]
    assert paired.holm([]) == []


def test_a_baseline_on_other_images_is_said(outputs: Path) -> None:
    run = next(outputs.glob("*relu*/s0*"))
    stored.evaluation(run, "quick-x", [True] * (N - 1) + [False], {"pgd": range(3)})
    (run / "evaluation" / "quick-x" / "clean.npz").unlink()
    with pytest.raises(UserError, match="missing or changed"):
        tables(measured(runs(outputs)), ["activation=relu"])


def test_pivot_puts_one_key_down_and_another_across(outputs: Path) -> None:
    (table,) = tables(measured(selected(runs(outputs), "kwta", [])))
    with pytest.raises(UserError, match="training: not a column"):
        pivot(table, "activation.ratio", "training", "worst case")
    made(outputs, "lwta", 0, 10, ratio=0.1)
    (table,) = tables(measured(selected(runs(outputs), "wta", [])))
    turned = pivot(table, "activation.ratio", "activation", "worst case")
    assert turned.columns == ["activation.ratio", "kwta", "lwta"]
    assert turned.values[0] == {"activation.ratio": "0.1", "kwta": pytest.approx(0.75), "lwta": 0.5}
    assert "lwta" not in turned.rows[1]


def test_several_rows_in_a_cell_are_refused(outputs: Path) -> None:
    made(outputs, "kwta", 0, 10, ratio=0.1, over="channel")
    (table,) = tables(measured(runs(outputs)))
    with pytest.raises(UserError, match=r"several rows have .*they differ in activation.over"):
        pivot(table, "activation.ratio", "activation", "worst case")


def test_csv_has_unrounded_numbers_and_no_formula(outputs: Path) -> None:
    made(outputs, "=cmd", 0, 10)
    (table,) = tables(measured(runs(outputs)))
    read = list(csv.DictReader(io.StringIO(FORMATS["csv"](table))))
    assert float(next(row for row in read if row["activation.ratio"] == "0.2")["worst case"]) == pytest.approx(
        0.65
    )
    assert {row["activation"] for row in read} == {"kwta", "relu", "'=cmd"}


def test_markup_in_names_stays_text(outputs: Path) -> None:
    made(outputs, "<b>|x", 0, 10)
    (table,) = tables(measured(runs(outputs)))
    assert "&lt;b&gt;|x" in FORMATS["html"](table)
    assert "<b>" not in FORMATS["html"](table)
    lines = [line for line in FORMATS["markdown"](table).splitlines() if line.startswith("| <b>")]
    assert lines[0].startswith("| <b>\\|x |")


def test_copied_folders_give_the_same_table(outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("copy") / "of" / "outputs"
    shutil.copytree(outputs, elsewhere)
    assert tables(measured(runs(elsewhere))) == tables(measured(runs(outputs)))


def test_nothing_finished_is_said(tmp_path: Path) -> None:
    assert listing([]) == "no runs"
    with pytest.raises(UserError, match="no finished evaluation"):
        tables([])
