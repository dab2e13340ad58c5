"""The benchmarks' own arithmetic; what they time is for `make bench`."""

import pytest
from benchmarks.__main__ import page
from benchmarks.timing import Row, interleaved

from tests.conftest import ROOT


def test_a_row_shows_whether_its_goal_is_met() -> None:
    faster = Row("a", 2.0, "b", 30.0, "ms", "speed-up", 10)
    dearer = Row("a", 3.0, "b", 2.0, "ms", "cost", 1.2)
    assert (faster.ratio, faster.met) == (15, True)
    assert (dearer.ratio, dearer.met) == (1.5, False)
    assert Row("a", 3.0, "b", 2.0, "ms", "cost").met is None
    assert dearer.cells()[-3:] == ("1.50x", "≤ 1.2", "NO")


def test_rounds_are_interleaved_and_warm_up_rounds_are_dropped() -> None:
    order: list[str] = []
    sides = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    took = interleaved(sides, rounds=2, warm=1)
    assert order == ["a", "b"] * 3
    assert took.keys() == sides.keys()
    assert all(seconds > 0 for seconds in took.values())


def test_the_page_contains_every_figure() -> None:
    row = {
        "what": "forward",
        "ours": 2.0,
        "baseline": "snippet",
        "theirs": 30.0,
        "unit": "ms",
        "kind": "speed-up",
    }
    report = {"title": "op", "name": "op", "machine": "a CPU", "rounds": 7, "rows": [row], "notes": ["a note"]}
    written = (ROOT / "docs" / "performance.md").read_text()
    text = page([report], written)
    assert "| forward | 2 ms | snippet | 30 ms | 15.00x |  |  |" in text
    assert "Machine: a CPU. Rounds: 7 (op)." in text
    assert "- a note" in text
    assert text[text.index("## ") :] == written[written.index("## ") :]


@pytest.mark.slow
def test_the_fastest_benchmark_runs(tmp_path: object) -> None:
    import json
    import subprocess
    import sys
    from pathlib import Path

    path = Path(str(tmp_path)) / "figures.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.op", "--rounds", "1", "--json", str(path)], check=True, cwd=ROOT
    )
    assert json.loads(path.read_text())["rows"]
