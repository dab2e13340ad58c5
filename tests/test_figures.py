"""Figures of runs: the numbers drawn are those computed by hand from made records."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kwta_exp.cli import main
from kwta_exp.draw import checks, confusion, passes
from kwta_exp.errors import UserError
from kwta_exp.evaluation.results import wilson
from kwta_exp.evaluation.stored import Stored
from kwta_exp.storage import read_json, write_json
from tests import stored

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
