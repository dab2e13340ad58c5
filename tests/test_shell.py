"""Commands at the shell: Ctrl-C, closed pipes, full devices, ASCII terminals."""

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import ConfigCompositionException

from kwta_exp.errors import UserError, shortened
from kwta_exp.shell import INTERRUPTED, JobFormatter, at_the_shell
from tests.conftest import ROOT, TINY, run_py_forked

LONG = [override for override in TINY if not override.startswith("training.epochs")] + [
    "training.epochs=100000"
]


def started(*overrides: str, tmp_path: Path, **keywords: Any) -> "subprocess.Popen[str]":
    """run.py in a process group of its own, as a shell would start it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *overrides, f"paths.outputs='{tmp_path / 'out'}'"],
        text=True, cwd=tmp_path, start_new_session=True, **keywords,
    )  # fmt: skip


def interrupted_at(line: str, command: Sequence[str], tmp_path: Path) -> tuple[int, str, str]:
    """Exit status, stdout after ``line`` and stderr of a run that gets Ctrl-C once it has printed ``line``."""
    with started(*command, tmp_path=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout
        assert any(re.search(line, said) for said in run.stdout), run.communicate()
        os.killpg(run.pid, signal.SIGINT)
        rest, errors = run.communicate(timeout=120)
    return run.returncode, rest, errors


@pytest.mark.slow
@pytest.mark.parametrize(("line", "command"), [
    ("epoch 1/", LONG),
    ("#0 epoch 1/", ["-m", *LONG, "seed=0,1"]),
    ("best epoch", [*TINY, "evaluation.n=360", "attack.pgd.steps=1000000", "evaluation.processes=2"]),
], ids=["training", "grid", "processes"])  # fmt: skip
def test_ctrl_c_is_one_line(line: str, command: list[str], tmp_path: Path) -> None:
    status, rest, errors = interrupted_at(line, command, tmp_path)
    assert status == INTERRUPTED
    assert errors.splitlines() == ["interrupted; the same command continues"]
    assert "Traceback" not in rest
    assert "#1" not in rest  # a grid ends as well


@pytest.mark.slow
def test_closed_pipe_does_not_stop_a_run(tmp_path: Path) -> None:
    with started(*TINY, tmp_path=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout
        assert run.stderr
        assert run.stdout.readline().startswith("training")
        run.stdout.close()  # as head -1 does
        assert run.stderr.read() == ""
        assert run.wait(timeout=120) == 0
    (log,) = (tmp_path / "out").glob("*/s0-*/run.log")
    assert "worst case" in log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_full_device_gives_no_traceback(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        run = started(*TINY, tmp_path=tmp_path, stdout=full, stderr=subprocess.PIPE)
        _, errors = run.communicate(timeout=120)
    assert (run.returncode, errors) == (0, "")


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]])
def test_help_and_config_accept_a_closed_pipe(flags: list[str], tmp_path: Path) -> None:
    with started(*flags, tmp_path=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout
        assert run.stderr
        run.stdout.close()
        assert run.stderr.read() == ""
        assert run.wait(timeout=60) == 0


@pytest.mark.slow
def test_ascii_terminal_shows_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "Gr\u00f6\u00dfe"
    folder.mkdir()
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = started(
        *TINY, tmp_path=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )  # fmt: skip
    said, errors = run.communicate(timeout=120)
    assert (run.returncode, errors) == (0, "")
    assert said.isascii()
    assert "------" in said
    assert "worst case" in said
    (log,) = (folder / "out").glob("*/s0-*/run.log")
    assert "Gr\u00f6\u00dfe" in log.read_text(encoding="utf-8")


def test_log_lines_of_a_grid_begin_with_the_job_number(tmp_path: Path) -> None:
    command = [f"paths.outputs={tmp_path}", *TINY, "suite=none", "training.epochs=1"]
    command = [override for override in command if not override.startswith("attack.")]
    grid = run_py_forked("-m", *command, "seed=0,1")
    assert grid.returncode == 0, grid.stderr
    epochs = [line for line in grid.stdout.splitlines() if "epoch 1/" in line]
    assert [line.split(" epoch")[0] for line in epochs] == ["#0", "#1"]
    alone = run_py_forked(*command, "seed=2")
    assert alone.stdout.startswith("training ")


def test_job_formatter_puts_the_job_number_first_in_each_line() -> None:
    record = logging.LogRecord("n", logging.INFO, "f", 1, "epoch %d", (3,), None)
    assert JobFormatter(7).format(record) == "#7 epoch 3"
    assert JobFormatter().format(record) == "epoch 3"
    table = logging.LogRecord("n", logging.INFO, "f", 1, "a table\nof two lines", (), None)
    assert JobFormatter(7).format(table) == "#7 a table\n#7 of two lines"


@pytest.mark.parametrize(("error", "status", "said"), [
    (UserError("x=1: expected 2"), 1, "x=1: expected 2\nSet the environment"),
    (ConfigCompositionException("no"), 1, "no\nSet the environment"),
    (KeyboardInterrupt(), INTERRUPTED, "interrupted; the same command continues\n"),
    (UserError("name=\x1b[31m\x07"), 1, r"name=\x1b[31m\x07"),
])  # fmt: skip
def test_user_error_and_interrupt_end_in_one_message(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped, at_the_shell():
        raise error
    assert stopped.value.code == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), at_the_shell():
        1 / 0  # noqa: B018


def test_shortened_keeps_both_ends_of_a_message() -> None:
    message = shortened("key=" + "x" * 5000 + ": expected a number")
    assert message.startswith("key=xxx")
    assert message.endswith("xxx: expected a number")
    assert len(message) < 700
    lines = shortened("\n".join(map(str, range(500)))).splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("0", "499", 41)
    assert shortened("short\nenough") == "short\nenough"
