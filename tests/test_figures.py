"""kwta-exp draw: the kinds that look at networks, from the command line."""

import csv
import shutil
from pathlib import Path

import pytest

from kwta_exp.cli import main
from kwta_exp.draw import activations
from tests import launched
from tests.conftest import TINY

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two trained runs, of k-WTA and ReLU."""
    outputs = tmp_path_factory.mktemp("runs")
    wide = [override.replace("hidden=[32]", "hidden=[400]") for override in TINY]
    for activation in ("kwta", "relu"):
        launched.launch(outputs, *wide, f"activation={activation}")
    return [str(path.parent) for path in sorted(outputs.glob("*/*/results.json"))]


def drawn(kind: str, folder: Path, *arguments: str) -> Rows:
    """The rows of the CSV file that the command writes."""
    main(["draw", kind, *arguments, "-o", str(folder)])
    assert all((folder / f"{kind}.{suffix}").stat().st_size > 1000 for suffix in ("svg", "png"))
    with (folder / f"{kind}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def message(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="1"):
        main(["draw", *arguments])
    return capsys.readouterr().err


def test_activations_shows_what_each_lets_through(tmp_path: Path) -> None:
    rows = drawn("activations", tmp_path)
    kept = {
        name: [float(row["value"]) for row in rows if row["activation"] == name and row["zeroed"] == "False"]
        for name in ("input", "ReLU", "max-pooling", "LWTA", "k-WTA")
    }
    values = list(activations.VALUES)
    assert kept["input"] == values
    assert kept["ReLU"] == [value for value in values if value > 0]
    assert kept["max-pooling"] == kept["LWTA"] == [1.9, -0.2, 2.4]
    assert kept["k-WTA"] == [1.9, 2.4, 1.6]
    rows = drawn("activations", tmp_path, "--values", "3", "-1", "2", "0.5", "--k", "1", "--group-size", "2")
    assert [float(row["value"]) for row in rows if row["activation"] == "LWTA"] == [3, 0, 2, 0]
    assert [float(row["value"]) for row in rows if row["activation"] == "k-WTA"] == [3, 0, 0, 0]


def test_fit_lists_the_discontinuities(tmp_path: Path) -> None:
    rows = drawn("fit", tmp_path, "--hidden", "50", "--steps", "20", "--points", "4")
    count = {
        name: sum((row["activation"], row["what"]) == (name, "discontinuity") for row in rows)
        for name in ("kwta", "relu")
    }
    assert count["kwta"] > 3
    assert count["relu"] == 0
    assert sum((row["activation"], row["what"]) == ("relu", "point") for row in rows) == 4


def test_landscape_and_discontinuities_of_trained_runs(tmp_path: Path, runs: list[str]) -> None:
    rows = drawn("landscape", tmp_path, *runs, "--points", "5")
    assert {row["network"] for row in rows} == {"k-WTA 0.1, natural", "ReLU, natural"}
    assert len(rows) == 2 * 5 * 5
    centres = {row["network"]: row["loss"] for row in rows if float(row["gradient_step"]) == 0}
    assert len(centres) == 2

    rows = drawn("discontinuities", tmp_path, *runs, "--images", "2")
    jumps = {name: [int(row["discontinuities"]) for row in rows if row["network"] == name] for name in centres}
    assert min(jumps["k-WTA 0.1, natural"]) > 0
    assert jumps["ReLU, natural"] == [0, 0]
    assert all(0 < float(row["flips"]) <= float(row["fires"]) <= 1 for row in rows)


def test_files_go_beside_the_first_run_by_default(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["draw", "landscape", runs[0], "--points", "3"])
    figures = Path(runs[0]) / "figures"
    assert capsys.readouterr().out.split() == [
        str(figures / f"landscape.{end}") for end in ("svg", "png", "csv")
    ]
    shutil.rmtree(figures)


def test_wrong_options_are_one_message_each(
    tmp_path: Path, runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, expected in {
        ("activations", "--k", "13"): "--k 13: expected 1 to 12",
        ("activations", "--group-size", "5"): "--group-size 5: expected a divisor of 12",
        ("fit", "--ratio", "1.5"): "--ratio 1.5: expected in (0, 1]",
        ("fit", "--points", "1"): "--points 1: expected 2 or more",
        ("landscape", runs[0], "--points", "4"): "--points 4: expected an odd number of 3 or more",
        ("landscape", runs[0], "--extent", "-1"): "--extent -1.0: expected more than 0",
        ("landscape", runs[0], "--images", "0"): "--images 0: expected 1 or more",
        ("landscape", runs[0], "--images", "100000"): "are classified correctly by all of these networks",
        ("landscape", runs[0], runs[0]): "the same run is given twice",
        ("landscape", str(tmp_path)): "no finished training there",
    }.items():
        assert expected in message(capsys, *arguments), arguments
