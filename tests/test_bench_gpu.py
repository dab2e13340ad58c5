"""`make bench-gpu` contains errors, crashes and time-outs in their rows."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import ROOT, Results, measure, page
from benchmarks.gpu_rows import MARK, SECTIONS, Setting, all_rows, is_cuda_error, layer

NAMES = ["a", "b", "c"]


def script(answers: dict[str, str]) -> Callable[[Sequence[str]], list[str]]:
    """A worker that runs a line of Python for each row, after naming its machine."""

    def worker(names: Sequence[str]) -> list[str]:
        lines = ["import json, os, sys, time", say({"machine": "a GPU"})]
        return [sys.executable, "-u", "-c", "\n".join([*lines, *(answers[name] for name in names)])]

    return worker


def say(message: dict[str, Any]) -> str:
    return f"print({MARK!r} + {json.dumps(message)!r}, flush=True)"


def cells(value: float) -> str:
    return say({"cells": {"ms": value}})


def test_every_row_is_measured() -> None:
    results = measure(NAMES, script({name: cells(i) for i, name in enumerate(NAMES)}), 60, 60)
    assert results == Results({"a": {"ms": 0}, "b": {"ms": 1}, "c": {"ms": 2}}, {}, "a GPU")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (say({"error": "ValueError: no"}), "ValueError: no"),
        ("os._exit(3)", "its process ended with status 3"),
        ("os.kill(os.getpid(), 9)", "its process ended with status -9"),
        ("time.sleep(60)", "stopped after 2 s"),
        (say({"error": "AcceleratorError: CUDA error"}) + "\nsys.exit()", "AcceleratorError: CUDA error"),
        ("print('noise')\n" + say({"error": "after noise"}), "after noise"),
    ],
)
def test_an_error_costs_no_other_row(answer: str, error: str) -> None:
    results = measure(NAMES, script({"a": cells(1), "b": answer, "c": cells(3)}), 60, 2)
    assert results.cells == {"a": {"ms": 1}, "c": {"ms": 3}}
    assert results.errors == {"b": error}


def test_rows_without_time_say_so() -> None:
    results = measure(NAMES, script({"a": cells(1), "b": "time.sleep(60)", "c": cells(3)}), 3, 60)
    assert results.cells == {"a": {"ms": 1}}
    assert results.errors["b"].startswith("stopped after")
    assert results.errors["c"].startswith("not measured")


@pytest.mark.parametrize("program", ["import sys; sys.exit(1)", "", "print('hello')"])
def test_a_worker_that_does_not_start_ends_the_page(program: str) -> None:
    results = measure(NAMES, lambda names: [sys.executable, "-c", program], 60, 60)
    assert not results.cells
    assert set(results.errors) == set(NAMES)


def test_the_page_shows_figures_and_errors() -> None:
    first, second = list(SECTIONS[0].rows)[:2]
    column = SECTIONS[0].columns[0]
    text = page(Results({first: {column: 0.125}}, {second: "ValueError: a|b"}, "a GPU"), 3.0)
    assert f"| {first} | 0.125 |" in text
    assert f"| {second} | ValueError: a/b |" in text
    assert "Machine: a GPU. The page took 3.0 minutes." in text
    widths = {section.title: len(section.columns) + 2 for section in SECTIONS}
    for section in SECTIONS:
        table = text.split(f"## {section.title}\n")[1].split("##")[0]
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len(rows) == 2 + len(section.rows)
        assert {row.count("|") for row in rows} == {widths[section.title]}


def test_rows_have_names_of_their_own() -> None:
    names = list(all_rows())
    assert len(set(names)) == len(names)


def test_a_layer_is_measured_on_a_cpu() -> None:
    found = layer(Setting("cpu", small=True), 64, torch.float32)
    assert found.keys() == set(SECTIONS[0].columns)
    assert all(value > 0 for value in found.values() if isinstance(value, float))


def test_cuda_errors_end_a_worker() -> None:
    assert is_cuda_error(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_cuda_error(RuntimeError("shape mismatch"))
    assert not is_cuda_error(torch.OutOfMemoryError("CUDA out of memory."))


@pytest.mark.gpu
def test_the_page_is_made_on_a_gpu(tmp_path: Path) -> None:
    import subprocess

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = tmp_path / "page.md"
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--minutes", "8", "--page", str(path)]
    subprocess.run(command, check=True, cwd=ROOT)
    assert "no CUDA graph" not in path.read_text()
