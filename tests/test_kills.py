"""A grid whose processes are killed again and again ends with the results of an undisturbed one."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from kwta_exp.report.status import status
from tests.conftest import TINY, run_py_forked
from tests.grids import attempts, has_begun, outcomes, the_grid
from tests.test_launchers import needs_joblib, start, wait_for

GRID = [
    "-m", *(each for each in TINY if not each.startswith("training")), "suite=quick", "training=pgd",
    "training.epochs=6", "activation=relu,kwta", "seed=0,1,2", "retries=0",
]  # fmt: skip
KILLS = 20


@dataclass(frozen=True)
class Undisturbed:
    """The grid when nobody disturbs it, and how long it takes."""

    outputs: Path
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    outputs, started = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    done = run_py_forked(*GRID, f"paths.outputs={outputs}")
    assert done.returncode == 0, done.stderr
    return Undisturbed(outputs, time.monotonic() - started)


def assert_one_process_a_folder(outputs: Path, ended: dict[int, float]) -> int:
    """Every attempt at a run began after the process of the one before it had ended; returns their number.

    Args:
        outputs: of the grid.
        ended: when each process was seen to have ended, by its number.
    """
    count = 0
    for tried in attempts(outputs, the_grid(outputs)).values():
        for before, after in pairwise(tried):
            over = before["started"] + before["seconds"] if "ended" in before else ended[before["pid"]]
            assert after["started"] >= over - 0.01, tried
        count += len(tried)
    return count


def assert_like(outputs: Path, undisturbed: Path) -> None:
    assert {job.state for job in the_grid(outputs).jobs()} == {"finished"}, status(the_grid(outputs))
    assert outcomes(outputs) == outcomes(undisturbed)
    assert len(outcomes(outputs)) == 6


def test_a_grid_killed_twenty_times_ends_like_an_undisturbed_one(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    draw, ended = random.Random(0), dict[int, float]()
    for _ in range(KILLS):
        # To find all jobs finished takes a fifth of the time.
        with pytest.raises(subprocess.TimeoutExpired):
            run_py_forked(
                *GRID, f"paths.outputs={tmp_path}", timeout=undisturbed.seconds * draw.uniform(0.02, 0.12)
            )
        note_ends(tmp_path, ended)
    done = run_py_forked(*GRID, f"paths.outputs={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert_like(tmp_path, undisturbed.outputs)
    assert assert_one_process_a_folder(tmp_path, ended) > 6


@needs_joblib
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_launcher_and_workers_killed_twenty_times_end_like_an_undisturbed_grid(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    draw, ended = random.Random(1), dict[int, float]()
    parallel = [*GRID, "hydra/launcher=parallel", "hydra.launcher.n_jobs=2"]
    for _ in range(KILLS):
        launcher = start(tmp_path, *parallel)
        time.sleep(draw.uniform(3, 10))  # to load torch takes half of it
        victims = [launcher.pid, *workers(launcher.pid)]
        os.kill(draw.choice(victims), signal.SIGKILL)
        launcher.communicate(timeout=60)
        wait_for(lambda victims=victims: not any(map(is_alive, victims)))
        note_ends(tmp_path, ended)
    last = start(tmp_path, *parallel)
    said, _ = last.communicate(timeout=120)
    assert last.returncode == 0, said
    assert_like(tmp_path, undisturbed.outputs)
    assert assert_one_process_a_folder(tmp_path, ended) > 6


def note_ends(outputs: Path, ended: dict[int, float]) -> None:
    """Note the time for each process that an attempt names."""
    if has_begun(outputs):
        for tried in attempts(outputs, the_grid(outputs)).values():
            for each in tried:
                ended.setdefault(each["pid"], time.time())


def workers(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
