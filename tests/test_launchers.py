"""Launchers run a grid's jobs side by side and leave what the basic launcher leaves."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from kwta_exp import gpu_slots, hardware
from kwta_exp.errors import UserError
from kwta_exp.grid import _divide_machine, _require_plugin
from kwta_exp.report.status import status
from kwta_exp.storage import read_json
from tests.conftest import TINY, run_py_forked
from tests.grids import attempts, has_begun, outcomes, the_grid

ROOT = Path(__file__).parent.parent
GRID = ["-m", *TINY, "suite=quick", "activation=relu,kwta", "seed=0,1"]

needs_joblib = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None,
    reason="the extra parallel is missing",
)


def start(outputs: Path, *overrides: str, cwd: Path = ROOT) -> "subprocess.Popen[str]":
    """Start a grid in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *overrides, f"paths.outputs={outputs}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd,
    )  # fmt: skip


@needs_joblib
def test_parallel_jobs_run_at_once_and_leave_the_files_of_the_basic_launcher(tmp_path: Path) -> None:
    basic = run_py_forked(*GRID, f"paths.outputs={tmp_path / 'basic'}")
    assert basic.returncode == 0, basic.stderr
    parallel = start(tmp_path / "parallel", *GRID, "hydra/launcher=parallel", "hydra.launcher.n_jobs=2")
    said, _ = parallel.communicate()
    assert parallel.returncode == 0, said
    assert outcomes(tmp_path / "parallel") == outcomes(tmp_path / "basic")
    assert len(outcomes(tmp_path / "basic")) == 4
    commands = {read_json(path)["command"] for path in tmp_path.glob("parallel/*/s*/environment.json")}
    assert all(command.startswith("python run.py model=mlp") for command in commands), commands
    first, second, *_ = the_grid(tmp_path / "parallel").jobs()
    assert first.seconds is not None
    assert second.seconds is not None
    ends = first.started + first.seconds, second.started + second.seconds
    assert max(first.started, second.started) < min(ends)
    assert "#0 training" in said
    assert "#1 training" in said
    again = run_py_forked(*GRID, f"paths.outputs={tmp_path / 'parallel'}")
    assert again.stdout.count("already finished") == 4


@needs_joblib
def test_workers_end_with_their_launcher_and_save_their_state(tmp_path: Path) -> None:
    grid = ["-m", *TINY, "suite=none", "activation=relu", "seed=0,1,2", "training.epochs=100000"]
    grid = [each for each in grid if not each.startswith("attack.")]
    parallel = start(tmp_path, *grid, "hydra/launcher=parallel", "hydra.launcher.n_jobs=2")

    def under_way(number: int) -> "dict[str, Any] | None":
        tried = attempts(tmp_path, the_grid(tmp_path)).get(number) if has_begun(tmp_path) else None
        return tried[-1] if tried and (tmp_path / folder(number) / "metrics.jsonl").exists() else None

    def folder(number: int) -> str:
        return str(next(job.folder for job in the_grid(tmp_path).jobs() if job.number == number))

    wait_for(lambda: under_way(0) and under_way(1))
    parallel.kill()
    wait_for(lambda: all("ended" in attempts(tmp_path, the_grid(tmp_path))[number][-1] for number in (0, 1)))
    parallel.communicate()
    for number in (0, 1):
        (tried,) = attempts(tmp_path, the_grid(tmp_path))[number]
        assert tried["ended"] == "interrupted"
        assert (tmp_path / folder(number) / "checkpoints" / "state.pt").exists()
        wait_for(lambda tried=tried: not is_running(tried["pid"]))
    assert [job.state for job in the_grid(tmp_path).jobs()] == ["running", "running", "missing"]
    assert "2 interrupted" in status(the_grid(tmp_path))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("attached", [False, True])
def test_ray_jobs_leave_the_files_of_the_basic_launcher(tmp_path: Path, attached: bool) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="without the extra ray")
    basic = run_py_forked(*GRID, f"paths.outputs={tmp_path / 'basic'}")
    assert basic.returncode == 0, basic.stderr
    address = ["hydra.launcher.ray.init.address=auto"] if attached else []
    if attached:
        ray("start", "--head", "--num-cpus=2", "--include-dashboard=false")  # in another folder than the grid
    try:
        started = start(Path("ray"), *GRID, "hydra/launcher=ray", *address, cwd=tmp_path)
        said, _ = started.communicate(timeout=300)
    finally:
        if attached:
            ray("stop", "--force")
    assert started.returncode == 0, said
    assert "deprecated" not in said
    assert outcomes(tmp_path / "ray") == outcomes(tmp_path / "basic")
    for tried in attempts(tmp_path / "ray", the_grid(tmp_path / "ray")).values():
        assert tried[0]["command"].startswith("python run.py model=mlp")


@pytest.mark.slow
def test_a_lost_ray_job_loses_no_other(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="without the extra ray")
    grid = [
        "-m", *(each for each in TINY if not each.startswith("training.")), "activation=relu", "suite=quick",
        "training.epochs=100000,2,3", "hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=1",
        "hydra.launcher.ray.remote.max_retries=0",
    ]  # fmt: skip
    started = start(tmp_path, *grid)
    wait_for(lambda: has_begun(tmp_path) and attempts(tmp_path, the_grid(tmp_path)).get(0))
    os.kill(attempts(tmp_path, the_grid(tmp_path))[0][-1]["pid"], signal.SIGKILL)
    said, _ = started.communicate(timeout=300)
    assert started.returncode == 1
    assert "job #0 was lost" in said
    assert len(outcomes(tmp_path)) == 2


def ray(*arguments: str) -> None:
    call = f"import sys; sys.argv = {['ray', *arguments]}; from ray.scripts.scripts import main; main()"
    subprocess.run([sys.executable, "-c", call], check=True, capture_output=True)


def hydra_config(*overrides: str) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from kwta_exp.environment import CONF

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


@pytest.mark.parametrize(
    ("overrides", "cores", "gpus", "n_jobs", "threads"),
    [
        (["hydra/launcher=parallel"], 8, 0, 8, 1),
        (["hydra/launcher=parallel", "hydra.launcher.n_jobs=3"], 8, 0, 3, 2),
        (["hydra/launcher=parallel", "hydra.launcher.n_jobs=16"], 8, 0, 16, 1),
        (["hydra/launcher=parallel"], 16, 4, 4, 4),
        (["hydra/launcher=parallel", "jobs_per_gpu=2"], 16, 4, 8, 2),
        (["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=5"], 8, 0, None, 5),
        (["hydra/launcher=ray", "hydra.launcher.ray.remote.num_cpus=2"], 8, 0, None, 2),
    ],
)
def test_a_machine_is_divided_among_jobs(
    overrides: list[str],
    cores: int,
    gpus: int,
    n_jobs: int | None,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "usable_cores", lambda: cores)
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: gpus)
    monkeypatch.setattr(hardware, "available_memory", lambda: 1 << 40)
    config = hydra_config(*overrides)
    _divide_machine(config)
    assert config.hydra.launcher.get("n_jobs") == n_jobs
    assert config.hydra.overrides.task[-1] == f"runtime.threads={threads}"


def test_threads_that_are_given_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("runtime.threads=7", "+runtime.threads=7"):
        config = OmegaConf.create(
            {
                "hydra": {
                    "launcher": {"_target_": "x.JoblibLauncher", "n_jobs": 2},
                    "overrides": {"task": [given], "hydra": []},
                },
                "runtime": {"threads": 7}, "jobs_per_gpu": 1,
            }
        )  # fmt: skip
        _divide_machine(config)
        assert config.hydra.overrides.task == [given]


def test_jobs_at_once_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "usable_cores", lambda: 64)
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: 0)
    for memory, jobs in ((5 << 30, 2), (1 << 20, 1), (1 << 40, 64), (None, 64)):
        monkeypatch.setattr(hardware, "available_memory", lambda memory=memory: memory)
        assert hardware.jobs_at_once(1) == jobs


def test_a_missing_plugin_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for plugin, extra in (("joblib", "parallel"), ("submitit", "slurm"), ("ray", "ray")):
        target = hydra_config(f"hydra/launcher={extra}").hydra.launcher._target_
        with pytest.raises(
            UserError, match=rf"hydra/launcher={extra}: hydra-{plugin}-launcher is not installed.*pip"
        ):
            _require_plugin(target)
    _require_plugin("hydra._internal.core_plugins.basic_launcher.BasicLauncher")


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[int], str]]:
    """Takes a GPU as a process of its own would; the machine has two."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(hardware, "gpu_entries", lambda: ["2", "GPU-x"])
    held = []

    def take(jobs_per_gpu: int) -> str:
        monkeypatch.setattr(gpu_slots, "_held", [])
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        gpu_slots.take_gpu(jobs_per_gpu)
        held.extend(gpu_slots._held)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    yield take
    for lock in held:
        lock.release()


def test_each_process_takes_a_free_gpu(slots: Callable[[int], str]) -> None:
    assert [slots(2) for _ in range(4)] == ["2", "GPU-x", "2", "GPU-x"]
    assert slots(2) in ("2", "GPU-x")  # more processes than slots share


def test_a_process_keeps_its_gpu(slots: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert slots(1) == "2"
    gpu_slots.take_gpu(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"


def test_gpus_are_named_as_the_user_named_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware.gpu_entries() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-aa")
    assert hardware.gpu_entries() == ["3", "GPU-aa"]


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.2)


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slurm
def test_a_slurm_grid_survives_cancelled_killed_timed_out_and_preempted_jobs(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if shutil.which("sbatch") is None or not slurm("sinfo", "-h"):
        pytest.skip("no SLURM controller answers")
    short = ",".join(str(epochs) for epochs in range(101, 112))
    grid = [
        "-m", *(each for each in TINY if not each.startswith("training.")), "activation=relu", "suite=quick",
        f"training.epochs=1200,{short}",
    ]  # fmt: skip
    outputs = tmp_path / "outputs"
    cluster = [
        "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=2",
        "hydra.launcher.signal_delay_s=30",
    ]  # fmt: skip

    def running(number: int) -> bool:
        """Whether a job trains."""
        if not has_begun(outputs):
            return False
        tried = attempts(outputs, the_grid(outputs)).get(number, [])
        return bool(tried) and "ended" not in tried[-1]

    def job_id(number: int) -> str:
        return str(attempts(outputs, the_grid(outputs))[number][-1]["slurm_job"])

    # SLURM sends the signal between 30 and 90 s before the end, and begins a requeued task two minutes later.
    first = start(outputs, *grid, *cluster)
    request.addfinalizer(first.kill)
    wait_for(lambda: running(1))
    slurm("scancel", job_id(1))
    print("job 1 cancelled:", job_id(1))
    wait_for(lambda: running(2))
    os.kill(attempts(outputs, the_grid(outputs))[2][-1]["pid"], signal.SIGKILL)
    print("job 2 killed")
    wait_for(lambda: running(3))
    slurm("scontrol", "requeue", job_id(3))
    print("job 3 preempted:", job_id(3))
    said, _ = first.communicate(timeout=900)  # the command waits for all of them
    print(said[-1500:])
    print(status(the_grid(outputs)))
    tried = attempts(outputs, the_grid(outputs))
    print({number: [each.get("ended", "killed") for each in of_job] for number, of_job in tried.items()})
    assert first.returncode == 1
    for number in (1, 2):
        assert f"job #{number} was lost" in said
    assert "the same command continues" in said
    assert len(tried[0]) >= 2, "job 0 was to run out of time"
    assert len(tried[3]) >= 2
    before = outcomes(outputs)
    assert len(before) == 10

    second = start(outputs, *grid, *cluster)
    said, _ = second.communicate(timeout=300)
    print(status(the_grid(outputs)))
    assert second.returncode == 0, said
    after = outcomes(outputs)
    assert len(after) == 12
    assert {name: after[name] for name in before} == before
    again = attempts(outputs, the_grid(outputs))
    assert all(len(again[number]) == len(tried[number]) for number in (0, *range(3, 12)))

    undisturbed = run_py_forked(*grid, f"paths.outputs={tmp_path / 'basic'}", timeout=300)
    assert undisturbed.returncode == 0
    assert outcomes(tmp_path / "basic") == after
