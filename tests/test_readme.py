"""Every command, file, block of Python and link in the README and its docs works as the text says."""

import logging
import re
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from kwta_exp import cli
from kwta_exp.activations import KWTA
from kwta_exp.models import MLP
from kwta_exp.storage import sha256_of_file
from kwta_exp.tracking import MLflow, TensorBoard, WandB
from tests.conftest import ROOT, run_py, run_py_forked
from tests.servers import server

DOCS = (
    "guide", "grids", "launchers", "tracking", "reference", "architecture", "verdict", "calibration",
    "performance", "results", "figures",
)  # fmt: skip
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / f"{name}.md" for name in DOCS)]

BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
]
NAMED = re.compile(r"(?:# @package _global_\n)?# (mine/\S+)\n")
FILES = {match[1]: text for _, text in BLOCKS if (match := NAMED.match(text))}
COMMANDS = list(dict.fromkeys(line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()))
PYTHON = [text for kind, text in BLOCKS if kind == "python" and not NAMED.match(text)]

SMALL = ["runtime=cpu", "runtime.threads=1", "scale=tiny"]
"""Added to every command, so that it takes seconds."""

SERVERS = {"tensorboard": "tensorboard.main", "mlflow": "mlflow"}
"""Commands that show pages until they are stopped, and their modules."""

SLOW = (
    "suite=strong", "compile=true", "image_folder", "paper/refutation", "model.name=densenet121", "resnet50",
    "wrn", "seed=0,1", "+point=", "launcher=ray",
)  # fmt: skip


def marks(line: str) -> tuple[pytest.MarkDecorator, ...]:
    """What a command needs."""
    if line.startswith(tuple(SERVERS)):
        return (pytest.mark.browser,)  # no other test opens a tracker's pages
    slow = (pytest.mark.slow,) if any(word in line for word in SLOW) else ()
    return (*slow, pytest.mark.slurm) if "launcher=slurm" in line else slow


def mlp(activation: Callable[[], torch.nn.Module] = torch.nn.ReLU) -> MLP:
    """The network of the checkpoint ``net.pth``, or the same with another activation."""
    return MLP(activation=activation, num_classes=10, in_channels=1, image_size=(8, 8), hidden=[1000, 1000])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.py, every file that the docs have a user write, a finished run and a finished grid."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copy(ROOT / "run.py", folder)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    rng = np.random.default_rng(0)
    x_train, x_test = (rng.integers(0, 256, (n, 8, 8), dtype=np.uint8) for n in (60, 40))
    np.savez(
        folder / "images.npz",
        x_train=x_train,
        y_train=np.arange(60) % 10,
        x_test=x_test,
        y_test=np.arange(40) % 10,
    )
    torch.manual_seed(0)
    torch.save(mlp().state_dict(), folder / "net.pth")
    done = run_py_forked(
        *SMALL,
        "training.epochs=1",
        "evaluation.n=8",
        "evaluation.save_images=true",
        "paths.outputs=finished",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    grid = ["-m", "activation=relu,kwta", "training.epochs=1", "evaluation.n=8", "sweep=mine"]
    done = run_py_forked(*grid, *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def parsed(line: str, folder: Path) -> tuple[dict[str, str], list[str]]:
    """The environment variables and the words of a command, with the docs' placeholders filled in."""
    (run,) = (folder / "finished").glob("*/s0-*")
    words = shlex.split(line, comments=True)
    placeholders = {
        "SWEEP_FOLDER": "outputs/sweeps/mine",
        "RUN_FOLDER": str(run.relative_to(folder)),
        "https://.../net.pth": f"file://{folder / 'net.pth'}",
        "weights_sha256=...": f"weights_sha256={sha256_of_file(folder / 'net.pth')}",
    }
    for name, value in placeholders.items():
        words = [word.replace(name, value) for word in words]
    if any(word.startswith("weights=file") for word in words):
        words += ["model=mlp", "activation=relu"]
    variables = [word for word in words if re.match(r"[A-Z_]+=", word)]
    return dict(word.split("=", 1) for word in variables), words[len(variables) :]


def skip_without_its_packages(line: str) -> None:
    """Not every tracker is small enough to be installed for the tests."""
    for tracking in (MLflow, TensorBoard, WandB):
        if re.search(rf"tracking={tracking.option}|track {tracking.option}", line):
            for module in tracking.modules:
                pytest.importorskip(module, reason=f"tracking={tracking.option} is not installed")


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(
            line,
            id=f"{number}: {line[:60].strip()}",
            marks=marks(line),
        )
        for number, line in enumerate(COMMANDS)
    ],
)
def test_every_command_runs(
    line: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_without_its_packages(line)
    if "launcher=ray" in line:
        pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="without the extra ray")
    variables, words = parsed(line, workspace)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if words[:2] == ["python", "run.py"]:
        extra = [] if {"--help", "--cfg"} & {*words} else SMALL
        # Joblib's workers never answer to a fork.
        run = run_py if "launcher=" in line else run_py_forked
        done = run(*words[2:], *extra, cwd=workspace)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        # A task of SLURM's has a log of its own.
        assert extra == [] or "Everything is in" in done.stdout or "launcher=slurm" in line
    elif words[0] == "kwta-exp":
        monkeypatch.chdir(workspace)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # a command sets it, for its own process
        monkeypatch.setattr(logging, "raiseExceptions", True)
        if words[1] == "transfer":
            words = [*words[:3], relu_run(workspace), "--n", "8"]
        cli.main(words[1:])
        assert capsys.readouterr().out
    elif words[0] in SERVERS:
        monkeypatch.chdir(workspace)
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        for module in (
            SERVERS[words[0]],
            *(["flask"] if words[0] == "mlflow" else []),
        ):  # mlflow-skinny lacks it
            pytest.importorskip(module, reason="make test-browser installs it")
        with server(SERVERS[words[0]], *words[1:]) as url:
            assert url.startswith("http://127.0.0.1:")
    else:
        assert words == ["mkdir", "-p", "data"]
        (workspace / "data").mkdir(exist_ok=True)


def relu_run(folder: Path) -> str:
    """The folder of a second run, with ReLU."""
    done = run_py_forked(*SMALL, "activation=relu", "suite=none", "paths.outputs=relu", cwd=folder)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "relu").glob("*/s0-*")
    return str(run)


def test_every_kind_of_own_part_has_a_recipe() -> None:
    groups = {Path(name).parent.name for name in FILES if name.endswith(".yaml")}
    assert groups == {"activation", "model", "dataset", "attack"}
    assert len(COMMANDS) > 40
    assert len(PYTHON) == 4


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_every_block_of_python_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = PYTHON[number].replace('suite="strong"', 'suite="quick"').replace("depth=18", "depth=18, width=4")
    names = {
        "model": mlp(partial(KWTA, ratio=0.1)),
        "x_test": torch.rand(4, 1, 8, 8),
        "y_test": torch.arange(4),
    }
    exec(text, names)
    if "audit(" in text:
        assert re.fullmatch(r"[\d.]+ (untested|masked)\n", capsys.readouterr().out)
    if "x_adv" in text:
        assert names["x_adv"].shape == names.get("x", names["x_test"]).shape  # type: ignore[union-attr]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, heading = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not heading or heading in anchors(path), target


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_make_target_that_the_docs_name_exists() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    targets = {
        line or quoted for line, quoted in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", text, re.MULTILINE)
    }
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_the_reference_lists_every_option() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    rows = re.findall(r"^\| (`[a-z_]+`(?:, `[a-z_]+`)*) \| (.*) \|$", text, re.MULTILINE)
    listed = {group: options for groups, options in rows for group in re.findall(r"`(\w+)`", groups)}
    for group in ("dataset", "activation", "model", "training", "optimizer", "sparsity", "suite", "runtime"):
        options = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        assert options <= set(re.findall(r"`([\w]+)`", listed[group])), group


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 620
