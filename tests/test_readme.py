"""Every command, file and piece of Python in the README does what the text says, run from the text itself."""

import logging
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kwta_exp import cli
from kwta_exp.activations import KWTA
from kwta_exp.models import MLP
from kwta_exp.storage import sha256_of_file
from tests.conftest import ROOT, run_py_forked

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
NAMED = re.compile(r"# (mine/\S+)\n")
FILES = {match[1]: text for _, text in BLOCKS if (match := NAMED.match(text))}
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
PYTHON = [text for kind, text in BLOCKS if kind == "python" and not NAMED.match(text)]

SMALL = ["runtime=cpu", "runtime.threads=1", "scale=tiny"]
"""What is added to every command, so that it takes seconds."""

SLOW = (
    "suite=strong", "compile=true", "image_folder", "paper/refutation", "model.name=densenet121", "resnet50",
    "wrn", "seed=0,1", "+point=",
)  # fmt: skip

SLOWLY = pytest.mark.slow


def mlp() -> MLP:
    return MLP(activation=torch.nn.ReLU, num_classes=10, in_channels=1, image_size=(8, 8), hidden=[1000, 1000])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.py, everything that the README has a user write, and one finished run."""
    place = tmp_path_factory.mktemp("newcomer")
    shutil.copy(ROOT / "run.py", place)
    for name, text in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    rng = np.random.default_rng(0)
    x_train, x_test = (rng.integers(0, 256, (n, 8, 8), dtype=np.uint8) for n in (60, 40))
    np.savez(
        place / "images.npz",
        x_train=x_train,
        y_train=np.arange(60) % 10,
        x_test=x_test,
        y_test=np.arange(40) % 10,
    )
    torch.manual_seed(0)
    torch.save(mlp().state_dict(), place / "net.pth")
    made = run_py_forked(
        *SMALL,
        "training.epochs=1",
        "evaluation.n=8",
        "evaluation.save_images=true",
        "paths.outputs=made",
        cwd=place,
    )
    assert made.returncode == 0, made.stderr
    return place


def words_of(line: str, place: Path) -> tuple[dict[str, str], list[str]]:
    """The environment variables and words of a command, with the README's placeholders filled in."""
    (run,) = (place / "made").glob("*/s0-*")
    words = shlex.split(line, comments=True)
    filled = {
        "RUN_FOLDER": str(run.relative_to(place)),
        "https://.../net.pth": f"file://{place / 'net.pth'}",
        "weights_sha256=...": f"weights_sha256={sha256_of_file(place / 'net.pth')}",
    }
    for name, value in filled.items():
        words = [word.replace(name, value) for word in words]
    if any(word.startswith("weights=file") for word in words):
        words += ["model=mlp", "activation=relu"]
    variables = [word for word in words if re.match(r"[A-Z_]+=", word)]
    return dict(word.split("=", 1) for word in variables), words[len(variables) :]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(
            line,
            id=f"{number}: {line[:60].strip()}",
            marks=SLOWLY if any(word in line for word in SLOW) else (),
        )
        for number, line in enumerate(COMMANDS)
    ],
)
def test_every_command_runs(
    line: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables, words = words_of(line, workspace)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if words[:2] == ["python", "run.py"]:
        extra = [] if {"--help", "--cfg"} & {*words} else SMALL
        done = run_py_forked(*words[2:], *extra, cwd=workspace)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert extra == [] or "Everything is in" in done.stdout
    elif words[0] == "kwta-exp":
        monkeypatch.chdir(workspace)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # a command sets it, for its own process
        monkeypatch.setattr(logging, "raiseExceptions", True)
        if words[1] == "transfer":
            words = [*words[:3], *other_run(workspace), "--n", "8"]
        cli.main(words[1:])
        assert capsys.readouterr().out
    else:
        assert words == ["mkdir", "-p", "data"]
        (workspace / "data").mkdir(exist_ok=True)


def other_run(place: Path) -> list[str]:
    done = run_py_forked(*SMALL, "activation=relu", "suite=none", "paths.outputs=other", cwd=place)
    assert done.returncode == 0, done.stderr
    (folder,) = (place / "other").glob("*/s0-*")
    return [str(folder)]


def test_every_kind_of_own_part_has_a_recipe() -> None:
    groups = {Path(name).parent.name for name in FILES if name.endswith(".yaml")}
    assert groups == {"activation", "model", "dataset", "attack"}
    assert len(COMMANDS) > 40
    assert len(PYTHON) == 2


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_every_piece_of_python_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = PYTHON[number].replace('suite="strong"', 'suite="quick"').replace("depth=18", "depth=18, width=4")
    names = {"model": mlp(), "x_test": np.zeros((4, 1, 8, 8), np.uint8), "y_test": np.arange(4), "KWTA": KWTA}
    exec(text, names)
    if "audit(" in text:
        assert "untested" in capsys.readouterr().out
    else:
        assert names["x_adv"].shape == (4, 3, 32, 32)  # type: ignore[union-attr]


def test_the_make_targets_that_it_names_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(map("".join, re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", README, flags=re.M))):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
