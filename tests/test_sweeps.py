"""A grid leaves a folder that says what became of each job; failed jobs are tried again, but not for ever."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from kwta_exp import attempts, conventions
from kwta_exp.attempts import lock_of
from kwta_exp.errors import UserError
from kwta_exp.report.status import jobs_of, status, sweeps_in
from kwta_exp.storage import write_json
from kwta_exp.sweeps import SkippedError, Sweep
from tests.conftest import TINY, run_py_forked

GRID = [
    "-m",
    *(each for each in TINY if not each.startswith("attack.")),
    "suite=none",
    "activation=relu",
    "seed=0",
]


def grid(outputs: Path, *overrides: str) -> "tuple[int, str, Sweep]":
    """Run a grid and return its exit status, its output, and its folder."""
    done = run_py_forked(*GRID, *overrides, f"paths.outputs={outputs}")
    return done.returncode, done.stdout + done.stderr, sweeps_in(outputs)[0]


def test_a_grid_records_its_jobs_and_the_same_command_continues_the_record(tmp_path: Path) -> None:
    rates = "optimizer.lr=0.05,1e30"
    code, _, sweep = grid(tmp_path, rates)
    assert code == 1
    first = sweep.jobs()
    assert [job.state for job in first] == ["finished", "failed"]
    assert "training diverged" in first[1].error
    assert "optimizer.lr=1e+30" in first[1].overrides
    for job in first:
        assert job.folder is not None
        assert (tmp_path / job.folder / "environment.json").exists()
    assert sweep.path.name.startswith("lr-")

    _, _, again = grid(tmp_path, rates)
    assert again == sweep
    assert len(list((tmp_path / "sweeps").iterdir())) == 1
    assert again.jobs()[0].started > first[0].started


def test_a_failed_job_is_tried_again_and_its_tracebacks_are_kept(tmp_path: Path) -> None:
    for number in range(1, 5):
        _, text, sweep = grid(tmp_path, "optimizer.lr=1e30,1e31", "retries=2")
        (job, _) = sweep.jobs()
        assert job.folder is not None
        tries = attempts.read(tmp_path / job.folder)
        assert len(tries) == min(number, 3)
        assert all("Traceback" in each["traceback"] and each["ended"] == "failed" for each in tries)
        assert job.state == ("failed" if number <= 3 else "skipped")
    assert "retries=2: failed 3 times" in text
    _, _, sweep = grid(tmp_path, "optimizer.lr=1e30,1e31", "retries=3", "sweep=more")
    assert [job.state for job in sweep.jobs()] == ["failed", "failed"]


def test_fail_fast_starts_no_job_after_the_first_failure(tmp_path: Path) -> None:
    code, text, sweep = grid(tmp_path, "optimizer.lr=1e30,0.05", "fail_fast=true", "sweep=mine")
    assert code == 1
    assert sweep.path == tmp_path / "sweeps" / "mine"
    assert [job.state for job in sweep.jobs()] == ["failed", "skipped"]
    assert "job #0 of this grid failed" in text
    shown = status(sweep)
    assert "1 failed" in shown
    assert "1 skipped" in shown


def test_a_name_that_is_no_folder_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    done = run_py_forked(*GRID, "optimizer.lr=0.05,0.1", "sweep=../mine", f"paths.outputs={tmp_path}/outputs")
    assert done.returncode == 1
    assert "sweep='../mine'" in done.stderr
    assert not (tmp_path / "outputs").exists()


def begun(
    outputs: Path, jobs: Sequence[Sequence[str]] | None, overrides: Sequence[str] = ("seed=0,1",)
) -> Sweep:
    sweep = Sweep.named(outputs, overrides, None)
    sweep.begin("python run.py -m seed=0,1", overrides, jobs)
    return sweep


def test_the_name_is_of_what_is_swept_and_of_all_overrides(tmp_path: Path) -> None:
    def name(*overrides: str) -> str:
        return Sweep.named(tmp_path, overrides, None).path.name

    assert name("activation.ratio=0.1,0.2", "seed=range(3)", "model=cnn").startswith("ratio-seed-")
    assert name("a=1,2", "b=1") == name("b=1", "a=1,2")
    assert name("a=1,2", "b=1") != name("a=1,2", "b=2")
    assert name("a=1").startswith("grid-")


def test_jobs_that_have_not_begun_are_missing(tmp_path: Path) -> None:
    sweep = begun(tmp_path, [["seed=0"], ["seed=1"], ["seed=2"]])
    with sweep.job(0, ["seed=0"], tmp_path):
        pass
    assert [job.state for job in sweep.jobs()] == ["finished", "missing", "missing"]
    assert "2 missing" in status(sweep)


def test_a_record_of_other_overrides_does_not_count(tmp_path: Path) -> None:
    sweep = begun(tmp_path, [["seed=0"], ["seed=1"]])
    with sweep.job(1, ["seed=7"], tmp_path):
        pass
    assert [job.state for job in sweep.jobs()] == ["missing", "missing"]


def test_a_killed_job_is_interrupted_unless_a_process_holds_its_run(tmp_path: Path) -> None:
    from filelock import FileLock

    sweep = begun(tmp_path, [["seed=0"], ["seed=1"]])
    run = tmp_path / "name" / "s0-0"
    run.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        with sweep.job(0, ["seed=0"], tmp_path) as job:
            job.runs_in(run)
            os._exit(9)  # as if killed
    os.waitpid(child, 0)
    assert [job.state for job in jobs_of(sweep)] == ["interrupted", "missing"]
    assert "killed or stopped" in status(sweep)
    with FileLock(lock_of(run)):
        assert [job.state for job in jobs_of(sweep)] == ["running", "missing"]


def test_time_to_go_is_the_mean_of_finished_jobs_by_what_is_left(tmp_path: Path) -> None:
    sweep = begun(tmp_path, [[f"seed={n}"] for n in range(5)])
    for number, seconds in enumerate([600, 1200]):
        with sweep.job(number, [f"seed={number}"], tmp_path):
            pass
        path = sweep.path / "jobs" / f"{number:05d}.json"
        content = {k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"}
        write_json(path, content | {"seconds": seconds})
    assert "about 45 min to go" in status(sweep)


def test_failures_before_this_start_do_not_stop_a_grid(tmp_path: Path) -> None:
    sweep = begun(tmp_path, [["seed=0"], ["seed=1"]])
    with pytest.raises(ValueError, match="boom"), sweep.job(0, ["seed=0"], tmp_path):
        raise ValueError("boom")
    assert sweep.failed_job() is not None
    begun(tmp_path, [["seed=0"], ["seed=1"]])
    assert sweep.failed_job() is None
    with pytest.raises(SkippedError), sweep.job(0, ["seed=0"], tmp_path):
        raise SkippedError("no")
    assert sweep.failed_job() is None


def test_a_sweeper_that_decides_as_it_goes_has_no_missing_jobs(tmp_path: Path) -> None:
    sweep = begun(tmp_path, None)
    with sweep.job(3, ["seed=5"], tmp_path):
        pass
    assert [(job.number, job.state) for job in sweep.jobs()] == [(3, "finished")]
    assert "a sweeper decides" in status(sweep)


def test_a_folder_without_a_grid_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no grid"):
        sweeps_in(tmp_path)


def test_a_record_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    sweep = begun(tmp_path, [["seed=0"]])
    with sweep.job(0, ["seed=0"], tmp_path):
        pass
    (sweep.path / "jobs" / "00000.json").write_text("{")
    assert [job.state for job in sweep.jobs()] == ["missing"]


def test_the_runs_of_a_grid_lie_inside_its_outputs(tmp_path: Path) -> None:
    sweep = begun(tmp_path, None)
    inside, outside = tmp_path / "name" / "s0-0", tmp_path.parent / "elsewhere"
    for number, folder in enumerate((inside, outside, tmp_path / "absent")):
        if number < 2:
            folder.mkdir(parents=True)
        with sweep.job(number, [f"seed={number}"], tmp_path) as job:
            job.runs_in(folder)
    assert sweep.runs() == [inside]
    assert Sweep(tmp_path).runs() == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hydra.run.dir=elsewhere", "paths.outputs=FOLDER"),
        ("hydra.sweep.dir=elsewhere", "sweep=NAME"),
        ("hydra.sweep.subdir=x", "paths.outputs=FOLDER"),
        ("hydra.output_subdir=.hydra", "overrides.yaml"),
        ("hydra.job.chdir=true", "paths.outputs"),
        ("--experimental-rerun=config.pickle", "runs code"),
    ],
)
@pytest.mark.parametrize("multirun", [False, True])
def test_options_of_hydra_that_have_no_place_here_are_refused(
    tmp_path: Path, given: str, expected: str, multirun: bool
) -> None:
    done = run_py_forked(
        *(["-m"] if multirun else []), given, f"paths.outputs={tmp_path / 'outputs'}", cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.startswith(given.partition("=")[0])
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_options_of_hydra_that_change_no_folder_work(tmp_path: Path) -> None:
    done = run_py_forked(
        *GRID[1:], "hydra.job.name=mine", "hydra.job.chdir=false", "hydra.verbose=false",
        f"paths.outputs={tmp_path / 'outputs'}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_a_missing_optuna_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conventions, "_is_installed", lambda plugin: False)
    with pytest.raises(UserError, match=r"hydra/sweeper=optuna: .*is not installed.*pip install"):
        conventions.refuse(["-m", "hydra/sweeper=optuna", "seed=0,1"])


@pytest.mark.skipif(not conventions._is_installed("hydra_optuna_sweeper"), reason="without the extra optuna")
def test_optuna_chooses_the_jobs_of_a_grid(tmp_path: Path) -> None:
    done = run_py_forked(
        *GRID, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.direction=maximize", "optimizer.lr=interval(0.01,0.1)", f"paths.outputs={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (sweep,) = sweeps_in(tmp_path)
    assert [job.state for job in sweep.jobs()] == ["finished"] * 3
    assert len({job.folder for job in sweep.jobs()}) == 3
