"""Trackers show what the run folder holds, each part once, offline, and no run depends on them."""

import json
import logging
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kwta_exp import cli
from kwta_exp.config import build, composed
from kwta_exp.errors import UserError
from kwta_exp.plan import Plan
from kwta_exp.report.runs import Run
from kwta_exp.storage import read_json, read_lines, write_lines
from kwta_exp.tracking import MLflow, TensorBoard, Tracking, WandB, base, followed, log_runs
from kwta_exp.tracking.base import TrackedRun, safe
from tests import stored
from tests.conftest import ROOT, TINY, run_py, run_py_forked
from tests.servers import server

N = 20
SMALL = [*TINY, "training.epochs=3"]
CLEAN = [*(each for each in SMALL if not each.startswith("attack.")), "suite=none"]
OPTIONS = sorted(path.stem for path in (ROOT / "conf" / "tracking").glob("*.yaml"))


def needs(option: str) -> None:
    for module in {"mlflow": MLflow.modules, "wandb": WandB.modules}.get(option, TensorBoard.modules):
        pytest.importorskip(module, reason=f"tracking={option} is not installed")


def epochs(number: int) -> list[dict[str, float]]:
    return [
        {"epoch": n, "loss": 1 / n, "accuracy": 0.5, "val_accuracy": 0.25 + n / 100}
        for n in range(1, number + 1)
    ]


def made(outputs: Path, seed: int = 0, number: int = 2, fooled: int = 4) -> Path:
    """A finished run that took ``number`` epochs."""
    run = outputs / "d-m-kwta-natural" / f"s{seed}-0123456789"
    stored.described(run, "kwta", seed, ratio=0.1)
    write_lines(run / "attempts.jsonl", [{"started": 1.5 + seed, "ended": "finished", "seconds": 1.0}])
    write_lines(run / "metrics.jsonl", epochs(number))
    stored.evaluation(run, "quick-x", [True] * N, {"pgd": range(fooled), "bpda": range(2 * fooled)}, seed=seed)
    return run


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; making one takes seconds."""
    needs("mlflow")
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow(tmp_path: Path, empty_database: Path) -> MLflow:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return MLflow(
        uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=str(tmp_path / "mlflow"), experiment="kwta_exp"
    )


@pytest.fixture
def tensorboard(tmp_path: Path) -> TensorBoard:
    needs("tensorboard")
    return TensorBoard(folder=str(tmp_path / "tensorboard"))


def events(run: Path) -> dict[str, list[tuple[int, Any]]]:
    """Step and value of each event in a folder of TensorBoard, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = EventAccumulator(str(run), size_guidance={"tensors": 0, "images": 0}).Reload()
    tensors = {
        tag: [(event.step, make_ndarray(event.tensor_proto)) for event in found.Tensors(tag)]
        for tag in found.Tags()["tensors"]
    }
    return tensors | {
        tag: [(each.width, each.height) for each in found.Images(tag)] for tag in found.Tags()["images"]
    }


def mlflow_runs(outputs: Path) -> tuple[Any, dict[str, Any]]:
    """MLflow's client, and its runs by name."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    experiment = client.get_experiment_by_name("kwta_exp")
    runs = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in runs}) == len(runs)
    return client, {run.info.run_name: run for run in runs}


def log_once(tracking: Tracking, run: Path, grid: str | None = None) -> None:
    with followed(tracking, run, grid) as track:
        track()


def test_tensorboard_shows_what_the_folder_holds(tmp_path: Path, tensorboard: TensorBoard) -> None:
    run = made(tmp_path, number=3)
    log_once(tensorboard, run, "mygrid")
    (folder,) = tmp_path.glob("tensorboard/mygrid/d-m-kwta-natural/s0-0123456789-*")
    found = events(folder)
    assert [step for step, _ in found["training/loss"]] == [1, 2, 3]
    assert [float(value) for _, value in found["training/loss"]] == pytest.approx([1, 1 / 2, 1 / 3])
    assert float(found["validation/accuracy"][-1][1]) == pytest.approx(0.28)
    results = read_json(run / "results.json")
    assert (
        float(found["quick/worst_case"][0][1]) == pytest.approx(results["worst_case"]["robust_accuracy"]) == 0.6
    )
    assert float(found["quick/attack/pgd"][0][1]) == pytest.approx(0.8)
    assert "UNTESTED" in str(found["evaluation/quick-x/text_summary"][0][1])


def test_mlflow_shows_what_the_folder_holds(tmp_path: Path, mlflow: MLflow) -> None:
    run = made(tmp_path, number=3)
    log_once(mlflow, run, "mygrid")
    client, runs = mlflow_runs(tmp_path)
    assert set(runs) == {"mygrid", "d-m-kwta-natural/s0-0123456789"}
    child = runs["d-m-kwta-natural/s0-0123456789"]
    assert child.data.tags["mlflow.parentRunId"] == runs["mygrid"].info.run_id
    assert (child.info.status, child.data.tags["verdict"]) == ("FINISHED", "untested")
    assert child.data.metrics["quick/worst_case"] == 0.6
    assert child.data.metrics["quick/attack/bpda"] == 0.6
    assert child.data.params["activation"] == "kwta"
    assert child.data.params["activation.ratio"] == "0.1"
    history = client.get_metric_history(child.info.run_id, "training/loss")
    assert [(each.step, each.value) for each in history] == [(1, 1), (2, 1 / 2), (3, 1 / 3)]
    (copied,) = (tmp_path / "mlflow").rglob("quick-x.json")
    assert json.loads(copied.read_text())["worst_case"] == read_json(run / "results.json")["worst_case"]


def test_checks_have_their_values() -> None:
    results = {
        "run": {"suite": "my suite+"}, "clean": {"accuracy": 0.9}, "attacks": {"a+b": {"robust_accuracy": 0.5}},
        "worst_case": None,
        "masking": {"flags": [{"check": "c", "value": 0.25}], "passed": [{"check": "p", "value": 1}]},
    }  # fmt: skip
    assert base.outcome(results) == {
        "my suite_/clean_accuracy": 0.9, "my suite_/attack/a_b": 0.5, "my suite_/check/p": 1.0,
        "my suite_/check/c": 0.25,
    }  # fmt: skip
    assert safe("a+b: \x1b") == "a_b_ _"


@pytest.mark.parametrize("option", ["tensorboard", "mlflow"])
def test_a_run_that_continues_logs_only_what_is_new(
    tmp_path: Path, option: str, request: pytest.FixtureRequest
) -> None:
    tracking = request.getfixturevalue(option)
    run = made(tmp_path, number=1)
    shutil.move(run / "evaluation", tmp_path / "later")
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117
        with followed(tracking, run, "first") as track:
            track()
            write_lines(run / "metrics.jsonl", epochs(2))
            track()
            raise KeyboardInterrupt
    if option == "mlflow":
        assert mlflow_runs(tmp_path)[1]["d-m-kwta-natural/s0-0123456789"].info.status == "KILLED"
    with followed(tracking, run, "another grid") as track:
        track()  # as after a resume: nothing is new
        write_lines(run / "metrics.jsonl", epochs(4))
        track()
        shutil.move(tmp_path / "later", run / "evaluation")
        track()
    log_once(tracking, run, None)
    stored.evaluation(run, "quick-y", [True] * N, {"pgd": range(10)})
    log_once(tracking, run, None)
    if option == "tensorboard":
        (folder,) = tmp_path.glob("tensorboard/*/d-m-kwta-natural/s0-*")
        assert folder.parent.parent.name == "first"
        found = events(folder)
        steps = [step for step, _ in found["training/loss"]]
        worst = [(step, float(value)) for step, value in found["quick/worst_case"]]
    else:
        client, runs = mlflow_runs(tmp_path)
        assert set(runs) == {"first", "d-m-kwta-natural/s0-0123456789"}
        info = runs["d-m-kwta-natural/s0-0123456789"].info
        assert info.status == "FINISHED"
        steps = [each.step for each in client.get_metric_history(info.run_id, "training/loss")]
        worst = [(each.step, each.value) for each in client.get_metric_history(info.run_id, "quick/worst_case")]
    assert steps == [1, 2, 3, 4]
    assert worst == [(1, pytest.approx(0.6)), (2, pytest.approx(0.5))]


@pytest.mark.parametrize("option", ["tensorboard", "mlflow"])
def test_figures_are_logged_once(tmp_path: Path, option: str, request: pytest.FixtureRequest) -> None:
    tracking = request.getfixturevalue(option)
    run = made(tmp_path)
    log_once(tracking, run)
    (run / "figures").mkdir()
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(run / "figures" / "landscape.png")
    (run / "figures" / "landscape.csv").write_text("1\n")
    for _ in range(2):
        log_once(tracking, run)
    if option == "tensorboard":
        (folder,) = tmp_path.glob("tensorboard/runs/*/s0-*")
        assert events(folder)["figures/landscape.png"] == [(6, 4)]
    else:
        client, runs = mlflow_runs(tmp_path)
        (artifact,) = client.list_artifacts(runs["d-m-kwta-natural/s0-0123456789"].info.run_id, "figures")
        assert artifact.path == "figures/landscape.png"


def test_wandb_writes_an_offline_run_of_each_attempt(tmp_path: Path) -> None:
    needs("wandb")
    tracking = WandB(folder=str(tmp_path), project="p", entity=None, mode="offline")
    run = made(tmp_path, number=1)
    for number in (1, 3, 3):
        write_lines(run / "metrics.jsonl", epochs(number))
        log_once(tracking, run, "mygrid")
    tracked = TrackedRun.of(run, None)
    assert read_json(tmp_path / "wandb" / f"{tracked.id}.json") == {
        "epoch": 3, "evaluations": ["quick-x"], "figures": [],
    }  # fmt: skip
    written = sorted(tmp_path.glob(f"wandb/offline-run-*-{tracked.id}/run-{tracked.id}.wandb"))
    assert written
    content = b"".join(path.read_bytes() for path in written)
    assert b"mygrid" in content
    assert content.count(b"quick/worst_case") == 1


class Failing(Tracking):
    """A tracker that fails at the given call."""

    option, modules, packages = "failing", (), ""

    def __init__(self, at: str) -> None:
        self.at, self.calls = at, list[str]()

    def open(self, run: TrackedRun) -> base.Log:
        self.called("open")
        outer = self

        class Log(base.Log):
            def add_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
                outer.called("epoch")

            def add_evaluation(self, name: str, results: Mapping[str, Any]) -> None:
                outer.called("evaluation")

            def add_figure(self, path: Path) -> None:
                outer.called("figure")

            def close(self, end: base.End) -> None:
                outer.called("close")

        return Log()

    def called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.at:
            raise RuntimeError("No space left on device\nmore")


@pytest.mark.parametrize("at", ["open", "epoch", "evaluation", "close"])
def test_a_tracker_that_fails_gives_one_warning(
    at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, tracking = made(tmp_path), Failing(at)
    with followed(tracking, run, None) as track:
        track()
        write_lines(run / "metrics.jsonl", epochs(5))
        track()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (
        "tracking=failing failed (RuntimeError: No space left on device); the run goes on"
        in record.getMessage()
    )
    assert tracking.calls.count(at) == 1
    assert tracking.calls[-1] == ("open" if at == "open" else "close")
    with pytest.raises(UserError, match="No space left"):
        log_runs(Failing(at), [Run.read(run)])


def test_an_error_of_the_run_is_the_one_that_is_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError):  # noqa: PT012, SIM117
        with followed(Failing("close"), made(tmp_path), None) as track:
            track()
            raise ZeroDivisionError
    assert len(caplog.records) == 1


@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "none"])
def test_a_missing_package_is_one_message_before_anything_starts(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_is_installed", lambda module: False)
    cfg, line = composed([f"tracking={option}", f"paths.outputs={tmp_path}", *SMALL])
    expected = rf"^tracking: tracking={option} needs .*{option}.*; expected python -m pip install {option},"
    with pytest.raises(UserError, match=expected):
        Plan.of(cfg, line)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_a_tracker_left_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "left_by_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not base._is_installed("left_by_tracker")
    assert base._is_installed("kwta_exp")
    assert not base._is_installed("no_such.package")


def test_tracking_is_no_part_of_a_runs_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_is_installed", lambda module: True)
    plans = [
        Plan.of(*composed([f"tracking={option}", f"paths.outputs={tmp_path}", *SMALL])) for option in OPTIONS
    ]
    assert len(plans) == 4
    assert {plan.folder.path for plan in plans} == {plans[0].folder.path}
    assert {type(plan.tracking).__name__ for plan in plans} == {"NoTracking", "TensorBoard", "MLflow", "WandB"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tracking.mode=disabled", r"tracking\.mode='disabled': expected 'offline' or 'online'"),
        ("tracking.project=1", r"tracking\.project=1: expected a valid string"),
        ("+tracking.team=x", r"tracking\.team: unknown key"),
    ],
)
def test_a_bad_value_names_key_and_value(override: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_is_installed", lambda module: True)
    cfg, _ = composed(["tracking=wandb", override])
    with pytest.raises(UserError, match=message):
        build(cfg, "tracking", Tracking)


WATCHED = """
import socket, sys
sys.argv = ["run.py", *sys.argv[1:]]
def no_lookup(*arguments, **others):
    print("NETWORK", arguments, flush=True)
    raise OSError("no network in this test")
class Socket(socket.socket):
    def connect(self, address): self._check(address); return super().connect(address)
    def connect_ex(self, address): self._check(address); return super().connect_ex(address)
    def bind(self, address): self._check(address); return super().bind(address)
    def _check(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] != "::1":
            no_lookup(address)
socket.socket, socket.getaddrinfo, socket.create_connection = Socket, no_lookup, no_lookup
from kwta_exp.command import main
try:
    main()
finally:
    print("LOADED", *sorted({"tensorboard", "mlflow", "sqlalchemy", "wandb"} & {*sys.modules}))
"""


@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_uses_no_network_and_loads_only_its_own_tracker(option: str, tmp_path: Path) -> None:
    """urllib3 binds ``::1`` to learn whether the machine has IPv6; that is not a connection."""
    if option != "none":
        needs(option)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *CLEAN, f"tracking={option}", f"paths.outputs={tmp_path}"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stdout
    assert "WARNING" not in done.stdout + done.stderr
    loaded = {"none": "", "mlflow": " mlflow sqlalchemy"}.get(option, f" {option}")
    assert done.stdout.splitlines()[-1] == f"LOADED{loaded}"
    (run,) = tmp_path.glob("digits-*/s0-*")
    assert [record["epoch"] for record in read_lines(run / "metrics.jsonl")] == [1, 2, 3]


def test_a_repeated_run_logs_nothing_again_and_a_rerun_is_another(tmp_path: Path) -> None:
    needs("tensorboard")
    command = [*SMALL, "tracking=tensorboard", f"paths.outputs={tmp_path}"]

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "tensorboard").rglob("events*")}

    assert run_py_forked(*command).returncode == 0
    first = files()
    done = run_py_forked(*command)
    assert "already finished" in done.stdout
    assert files() == first
    assert run_py_forked(*command, "rerun=true").returncode == 0
    assert len(files()) == 2
    (folder,) = {path.parent for path in files().keys() - first.keys()}
    assert [step for step, _ in events(folder)["training/loss"]] == [1, 2, 3]


def test_a_tracker_that_cannot_write_loses_no_run(tmp_path: Path) -> None:
    needs("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    done = run_py_forked(*CLEAN, "tracking=tensorboard", f"paths.outputs={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("tracking=tensorboard failed (") == 1
    (run,) = tmp_path.glob("digits-*/s0-*")
    assert read_json(run / "results.json")["clean"]["n"] == 40


@pytest.mark.parametrize("uri", ["sqlite:///{}/mlflow.db", "http://127.0.0.1:9"])
def test_a_damaged_database_or_an_absent_server_loses_no_run(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    needs("mlflow")
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    run = made(tmp_path)
    tracking = MLflow(uri=uri.format(tmp_path), artifacts=str(tmp_path / "mlflow"), experiment="e")
    with followed(tracking, run, None) as track:
        track()
        track()
    warnings = [each.getMessage() for each in caplog.records if each.name.startswith("kwta_exp")]
    assert len(warnings) == 1
    assert "the run goes on" in warnings[0]


def test_a_killed_run_continues_the_same_tracked_run(tmp_path: Path) -> None:
    needs("tensorboard")
    command = [*CLEAN, "training.epochs=30", "tracking=tensorboard", f"paths.outputs={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not [line for path in tmp_path.glob("digits-*/s0-*/metrics.jsonl") for line in read_lines(path)]:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run,) = tmp_path.glob("digits-*/s0-*")
    assert len(read_lines(run / "metrics.jsonl")) < 30, "the run ended before it could be killed"
    assert run_py_forked(*command).returncode == 0
    (folder,) = tmp_path.glob("tensorboard/runs/*/s0-*")
    assert [step for step, _ in events(folder)["training/loss"]] == list(range(1, 31))


def test_jobs_of_a_grid_that_run_at_once_share_a_database(tmp_path: Path) -> None:
    """Two processes that start at once, and make the database, the experiment and the grid's run."""
    needs("mlflow")
    for seed in range(2):
        made(tmp_path, seed, number=20)
    code = (
        "import sys; from pathlib import Path; from kwta_exp.tracking import MLflow, followed\n"
        "from kwta_exp.storage import read_lines, write_lines\n"
        "run = Path(sys.argv[1]); records = read_lines(run / 'metrics.jsonl')\n"
        "tracking = MLflow(uri=sys.argv[2], artifacts='a', experiment='kwta_exp')\n"
        "with followed(tracking, run, 'mygrid') as track:\n"
        "    for number in range(1, len(records) + 1):\n"
        "        write_lines(run / 'metrics.jsonl', records[:number]); track()\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(run), f"sqlite:///{tmp_path}/mlflow.db"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for run in sorted(tmp_path.glob("d-*/s*"))
    ]  # fmt: skip
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert (process.returncode, out) == (0, "")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    client, runs = mlflow_runs(tmp_path)
    parent = runs.pop("mygrid").info.run_id
    assert len(runs) == 2
    for run in runs.values():
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent
        history = client.get_metric_history(run.info.run_id, "training/loss")
        assert [each.step for each in history] == list(range(1, 21))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a grid of two, logged in TensorBoard as it ran."""
    needs("tensorboard")
    outputs = tmp_path_factory.mktemp("grid")
    done = run_py(
        "-m", "activation=relu,kwta", *SMALL, "sweep=mine", "tracking=tensorboard", f"paths.outputs={outputs}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return outputs


def logged_in_mlflow(grid: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log the grid's runs in MLflow, by the command."""
    if not (grid / "mlflow.db").exists():
        shutil.copy(database, grid / "mlflow.db")
    monkeypatch.setenv("KWTA_EXP_OUTPUTS", str(grid))
    cli.main(["track", "mlflow", str(grid / "sweeps" / "mine")])


def test_a_grid_is_a_folder_and_a_parent(
    grid: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = sorted(grid.glob("tensorboard/*/*/*"))
    assert [folder.parent.parent.name for folder in folders] == ["mine", "mine"]
    for _ in range(2):
        logged_in_mlflow(grid, empty_database, monkeypatch)
        assert capsys.readouterr().out.startswith("2 of 2 runs are logged: MLflow(")
    client, runs = mlflow_runs(grid)
    parent = runs.pop("mine").info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent}
    for name, run in runs.items():
        results = read_json(grid / name / "results.json")
        worst = run.data.metrics["quick/worst_case"]
        assert worst == results["worst_case"]["robust_accuracy"]
        (folder,) = (each for each in folders if f"{each.parent.name}/{each.name}".startswith(name))
        assert float(events(folder)["quick/worst_case"][0][1]) == pytest.approx(worst)
        history = client.get_metric_history(run.info.run_id, "validation/accuracy")
        written = read_lines(grid / name / "metrics.jsonl")
        assert [(m.step, m.value) for m in history] == [
            (each["epoch"], each["val_accuracy"]) for each in written
        ]


def test_track_leaves_out_runs_that_cannot_be_logged(
    tmp_path: Path, tensorboard: TensorBoard, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [made(tmp_path, seed) for seed in range(2)]
    (runs[0] / "config.yaml").write_text("changed")
    assert log_runs(tensorboard, [Run.read(run) for run in runs]).startswith("1 of 2 runs")
    assert "is damaged; not logged" in caplog.text


@pytest.fixture
def page() -> Iterator[Any]:
    """A page in Chromium that reaches this machine alone."""
    playwright = pytest.importorskip("playwright.sync_api", reason="make test-browser installs it")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": 1600, "height": 1000})
        page.route(lambda url: "//127.0.0.1:" not in url, lambda route: route.abort())
        yield page
        opened.close()


def accuracies(grid: Path) -> dict[str, float]:
    """The worst case of each run of the grid, by the run's name."""
    return {
        f"{path.parent.parent.name}/{path.parent.name}": read_json(path)["worst_case"]["robust_accuracy"]
        for path in grid.glob("*/s0-*/results.json")
    }


@pytest.mark.browser
def test_tensorboard_shows_the_grid_in_a_browser(grid: Path, page: Any) -> None:
    with server("tensorboard.main", "--logdir", str(grid / "tensorboard")) as url:
        page.goto(f"{url}/#timeseries&tagFilter=worst_case")
        worst = accuracies(grid)
        for name in worst:
            page.get_by_text(f"mine/{name}").first.wait_for(timeout=60_000)
        page.get_by_text("quick/worst_case").first.wait_for(timeout=60_000)
        for name, value in worst.items():
            (run,) = (each for each in page.request.get(f"{url}/data/runs").json() if name in each)
            tag = f"{url}/data/plugin/scalars/scalars?run={run}&tag=quick/worst_case"
            ((_, step, shown),) = page.request.get(tag).json()
            assert (step, shown) == (1, pytest.approx(value))
        page.goto(f"{url}/?table#hparams")
        page.get_by_text("quick/worst_case").first.wait_for(state="attached", timeout=60_000)
        for value in worst.values():
            page.get_by_text(f"{value:#.5g}").first.wait_for(state="attached", timeout=60_000)


@pytest.mark.browser
def test_mlflow_shows_the_grid_in_a_browser(
    grid: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch, page: Any
) -> None:
    pytest.importorskip("flask", reason="the pages are in the package mlflow, not in mlflow-skinny")
    logged_in_mlflow(grid, empty_database, monkeypatch)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    _, runs = mlflow_runs(grid)
    with server("mlflow", "ui", "--backend-store-uri", f"sqlite:///{grid}/mlflow.db") as url:
        for name, worst in accuracies(grid).items():
            info = runs[name].info
            page.goto(f"{url}/#/experiments/{info.experiment_id}/runs/{info.run_id}")
            row = page.get_by_role("row").filter(has_text="quick/worst_case")
            row.first.wait_for(timeout=60_000)
            assert f"{worst:.4g}" in row.first.inner_text()
            page.get_by_text("mine").first.wait_for(timeout=60_000)
