"""Figures: the numbers drawn are those of the runs, and the files are the same each time."""

import csv
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from scripts import figures

from kwta_exp.analysis.landscape import roughness
from kwta_exp.cli import main
from kwta_exp.draw import landscape, passes, ratio
from kwta_exp.draw.style import COLOURS, save
from kwta_exp.errors import UserError
from kwta_exp.report.runs import Run, find
from kwta_exp.report.summary import measured, over_seeds
from tests import stored

N = 20


def made(outputs: Path, activation: str, seed: int, pgd: int, worst: int, **values: object) -> None:
    """A run of :data:`N` images: PGD fools the first ``pgd`` of them, BPDA the first ``worst``."""
    amount = "".join(map(str, values.values()))
    run = outputs / f"d-m-{activation}{amount}-natural" / f"s{seed}-0123456789"
    stored.described(run, activation, seed, **values)
    stored.evaluation(run, "quick-x", [True] * N, {"pgd": range(pgd), "bpda": range(worst)}, seed=seed)


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    for seed in (0, 1):
        made(tmp_path, "kwta", seed, 4 + seed, 12 + 2 * seed, ratio=0.1)
        made(tmp_path, "kwta", seed, 6 + seed, 8 + 2 * seed, ratio=0.2)
    made(tmp_path, "relu", 0, 10, 10)
    return tmp_path


def test_the_curves_are_the_means_and_intervals_of_the_runs(outputs: Path) -> None:
    points = ratio.points(measured(map(Run.read, find([outputs]))))
    figure, rows = ratio.draw(points)
    assert [(row["activation"], row["ratio"], row["seeds"]) for row in rows] == [
        ("kwta", 0.1, 2), ("kwta", 0.2, 2), ("relu", "", 1),
    ]  # fmt: skip
    first = rows[0]
    assert (first["pgd"], first["pgd low"], first["pgd high"]) == pytest.approx(over_seeds([0.8, 0.75]))
    assert (first["worst"], first["worst low"], first["worst high"]) == pytest.approx(over_seeds([0.4, 0.3]))
    (axis,) = figure.axes
    by_label = {line.get_label(): line for line in axis.lines}
    pgd, worst = by_label["k-WTA, plain PGD"], by_label["k-WTA, worst case"]
    assert list(pgd.get_xdata()) == [0.1, 0.2]
    assert list(pgd.get_ydata()) == pytest.approx([77.5, 67.5])
    assert list(worst.get_ydata()) == pytest.approx([35, 55])
    assert list(by_label["ReLU, worst case"].get_ydata()) == pytest.approx([50, 50])
    assert to_hex(pgd.get_color()) == COLOURS["kwta"].lower()
    assert to_hex(by_label["ReLU, worst case"].get_color()) == COLOURS["relu"]


def test_the_files_hold_the_numbers_and_are_the_same_each_time(outputs: Path) -> None:
    points = ratio.points(measured(map(Run.read, find([outputs]))))
    one, two = (save(*_with_rows(ratio.draw(points), outputs / name)) for name in ("one", "two"))
    assert [path.suffix for path in one] == [".svg", ".png", ".csv"]
    assert all(first.read_bytes() == second.read_bytes() for first, second in zip(one, two, strict=True))
    with one[2].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["pgd"]) for row in table] == pytest.approx([0.775, 0.675, 0.5])


def _with_rows(drawn: tuple[object, list[dict[str, object]]], path: Path) -> tuple[object, Path, object]:
    figure, rows = drawn
    return figure, path, rows


def test_the_command_draws_into_the_outputs(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["draw", "ratio", str(outputs)])
    said = capsys.readouterr().out.splitlines()
    assert said == [str(outputs / "figures" / f"ratio.{suffix}") for suffix in ("svg", "png", "csv")]
    assert all(Path(path).stat().st_size > 100 for path in said)


def test_what_cannot_be_drawn_is_one_message(outputs: Path) -> None:
    found = measured(map(Run.read, find([outputs])))
    with pytest.raises(UserError, match="fewer than two values"):
        ratio.draw([each for each in ratio.points(found) if each.ratio != 0.1])
    with pytest.raises(UserError, match="no evaluation with an attack named pgd"):
        ratio.points([])
    made(outputs, "kwta", 5, 1, 2, ratio=0.3)
    other = outputs / "d-m-kwta0.3-natural" / "s5-0123456789"
    stored.evaluation(other, "strong-y", [True] * N, {"pgd": [0], "square": [1]}, suite="strong")
    with pytest.raises(UserError, match="differ in suite"):
        ratio.points(measured(map(Run.read, find([outputs]))))


def test_the_figure_of_the_readme_is_that_of_the_committed_records() -> None:
    _, rows = ratio.draw(figures.points(figures.RECORDS))
    with (figures.FOLDER / "gap.csv").open(newline="") as file:
        committed = list(csv.DictReader(file))
    assert [{key: str(value) for key, value in row.items()} for row in rows] == committed
    natural = {row["ratio"]: row for row in rows if (row["activation"], row["training"]) == ("kwta", "natural")}
    assert round(100 * (natural[0.1]["pgd"] - natural[0.1]["worst"]), 1) == 23.1  # as docs/results.md says


def test_the_page_of_a_grid_shows_the_figure_where_there_is_one(outputs: Path) -> None:
    main(["report", str(outputs)])
    page = (outputs / "report.html").read_text()
    assert page.count("<figure ") == 1
    assert page.count("<svg") == 1
    assert "<?xml" not in page
    main(["report", str(outputs), "activation=relu", "-o", str(outputs / "one.html")])
    assert "<figure " not in (outputs / "one.html").read_text()


def test_the_landscapes_of_the_readme_are_those_of_the_committed_numbers() -> None:
    found = figures.landscapes(figures.LANDSCAPES)
    assert list(found) == ["k-WTA 0.1, natural", "k-WTA 0.1, pgd", "ReLU, natural", "ReLU, pgd"]
    _, rows = landscape.draw(found)
    assert len(rows) == 4 * 41 * 41
    rough = {name: roughness(each) for name, each in found.items()}
    assert rough["k-WTA 0.1, natural"] > 10 * rough["ReLU, natural"]
    assert rough["k-WTA 0.1, pgd"] > 3 * rough["ReLU, pgd"]


def test_passes_of_several_networks_are_drawn_from_what_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "PASSES", tmp_path / "passes.json")
    table = "attack,passes,accuracy,low,high,n\npgd,0,0.9,,,50\npgd,40,0.5,0.4,0.6,50\nbpda,0,0.9,,,50\n"
    (tmp_path / "passes.csv").write_text(table + "bpda,80,0.1,0.04,0.2,50\n")
    for name in ("one", "other", "third", "fourth"):
        figures.record_passes({name: tmp_path / "passes.csv"})
    recorded = figures.passes_of(figures.PASSES)
    last = {"attack": "bpda", "passes": 80, "n": 50, "accuracy": 0.1, "low": 0.04, "high": 0.2}
    assert recorded["other"][-1] == last
    figure, rows = passes.side_by_side(recorded)
    assert rows == [{"network": name, **row} for name, table in recorded.items() for row in table]
    names = ("one", "other", "third", "fourth")
    assert [axis.get_title() for axis in figure.axes] == [f"{name}\nn = 50" for name in names]
    for axis in figure.axes:
        steps = {
            line.get_label(): line.get_xydata()[-1].tolist()
            for line in axis.lines
            if len(line.get_xdata()) == 2
        }
        assert steps == {"pgd": [40.0, 50.0], "bpda": [80.0, 10.0]}
