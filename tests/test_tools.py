"""kwta-exp: every command on runs of user classes, with the overrides of run.py, or with trust."""

import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from kwta_exp import cli
from kwta_exp.config import composed
from tests import launched
from tests.conftest import ROOT, TINY
from tests.stored import forge

SQUASH = """
import torch


class Squash(torch.nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return torch.tanh(self.slope * x)
"""

Say = Callable[..., str]


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: an activation with its YAML, images, and a run with both."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "squashes.py").write_text(SQUASH)
    (folder / "activation").mkdir()
    (folder / "activation" / "squash.yaml").write_text(
        "_target_: squashes.Squash\n_partial_: true\nslope: 0.5\n"
    )
    rng = np.random.default_rng(0)
    parts = {
        f"x_{part}": rng.integers(0, 256, (n, 8, 8), dtype=np.uint8)
        for part, n in (("train", 60), ("test", 40))
    }
    np.savez(folder / "images.npz", **parts, y_train=np.arange(60) % 10, y_test=np.arange(40) % 10)
    overrides = [
        "activation=squash",
        "activation.slope=0.2",
        "dataset=arrays",
        f"dataset.path={folder / 'images.npz'}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        launch(folder, folder / "out", *overrides)
    return folder


def launch(config_dir: Path | None, outputs: Path, *overrides: str) -> Path:
    """Run one experiment in this process with save_images; returns its folder."""
    given = [*TINY, "suite=quick", "evaluation.save_images=true", *overrides]
    launched.launch(outputs, *given, config_dir=config_dir)
    (folder,) = outputs.glob("*/s0-*")
    return folder


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mine: Path) -> Say:
    """What a command prints, or the message it ends with."""
    monkeypatch.syspath_prepend(str(mine))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # a command sets it, for its own process
    monkeypatch.setattr(logging, "raiseExceptions", True)

    def command(*words: object) -> str:
        with suppress(SystemExit):
            cli.main(list(map(str, words)))
        said = capsys.readouterr()
        return said.err or said.out

    return command


def own_run(mine: Path) -> Path:
    (folder,) = (mine / "out").glob("*/s0-*")
    return folder


def test_verify_needs_overrides_or_trust_for_user_classes(say: Say, mine: Path) -> None:
    folder = own_run(mine)
    parts = ["activation=squash", "activation.slope=0.2"]
    data = ["dataset=arrays", f"dataset.path={mine / 'images.npz'}"]
    assert "squashes.Squash, which is not a class of this project" in say("verify", folder, "--with", *data)
    lay = f"its data is at dataset.path={mine / 'images.npz'}, and a run folder may not choose a path"
    assert lay in say("verify", folder, "--config-dir", mine, "--with", *parts)
    for words in (["--config-dir", mine, "--with", *parts, *data], ["--trust"]):
        assert "as results.json says" in say("verify", folder, *words)
    other = say(
        "verify", folder, "--config-dir", mine, "--with", "activation=squash", "activation.slope=5", *data
    )
    assert "but results.json says" in other  # the network has the override's slope, not the recorded one


def test_transfer_and_compare_accept_runs_of_user_classes(say: Say, mine: Path, tmp_path: Path) -> None:
    folder = own_run(mine)
    relu = launch(
        None, tmp_path / "relu", "activation=relu", "dataset=arrays", f"dataset.path={mine / 'images.npz'}"
    )
    work = ["--work", tmp_path / "work", "--n", 20]
    assert "which is not a class of this project" in say(
        "transfer", relu, folder, *work, "--with", "dataset=digits"
    )
    said = say("transfer", relu, folder, *work, "--eps", "8/255", "--trust")
    assert "robust accuracy, linf eps 0.03137, pgd, n = 20" in said
    assert "n = 40" in say("compare", relu, folder)
    assert "given twice" in say("transfer", relu, relu, *work)


def test_transfer_attack_from_user_classes_needs_trust(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(mine))
    attack = ["+attack@attack.transfer=transfer", f"attack.transfer.source={own_run(mine)}",
              "attack.transfer.attack.steps=2", "dataset=arrays",
              f"dataset.path={mine / 'images.npz'}"]  # fmt: skip
    from kwta_exp.config import ConfigError

    with pytest.raises(
        ConfigError, match=r"attack\.transfer\.source=.*which is not a class of this project.*trust=true"
    ):
        launch(None, tmp_path / "out", *attack)
    folder = launch(None, tmp_path / "out", *attack, "trust=true")
    assert "transfer" in json.loads((folder / "results.json").read_text())["attacks"]


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an evaluation of a plain checkpoint file."""
    import torch

    from tests.test_audit import network

    place = tmp_path_factory.mktemp("audited")
    torch.save(network().state_dict(), place / "net.pth")
    return launch(None, place / "out", "training=none", f"weights={place / 'net.pth'}")


def test_run_that_only_evaluates_can_be_used_as_any_run(say: Say, audited: Path, tmp_path: Path) -> None:
    results = json.loads((audited / "results.json").read_text())
    assert "as results.json says" in say("verify", audited)
    assert "clean" in say(
        "transfer", audited, launch(None, tmp_path / "a", "activation=relu"), "--n", 8, "--work", tmp_path
    )
    again = launch(None, tmp_path / "again", "training=none", f"weights={audited}")
    found = json.loads((again / "results.json").read_text())
    assert found["worst_case"] == results["worst_case"]
    assert found["run"]["model"] == "mlp"
    assert found["run"]["source_sha256"] == found["run"]["weights_sha256"] == results["run"]["weights_sha256"]
    assert results["run"]["source_sha256"] != results["run"]["weights_sha256"]


def test_untrusted_folder_cannot_choose_paths_or_read_the_environment(
    say: Say, audited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    sent = tmp_path / "sent"
    shutil.copytree(audited, sent)
    config = OmegaConf.to_container(OmegaConf.load(sent / "config.yaml"), resolve=False)
    assert isinstance(config, dict)
    config["dataset"] = {
        "_target_": "kwta_exp.data.datasets.MNIST",
        "root": str(tmp_path / "chosen"),
        "download": True,
    }
    (sent / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    forge(sent)
    assert "a run folder may not choose a path" in say("verify", sent)

    config["dataset"] = {"_target_": "kwta_exp.data.datasets.MNIST", "root": "${paths.data}", "download": True}
    (sent / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    forge(sent)
    nowhere = say("verify", sent, "--with", f"paths.data={tmp_path / 'nowhere'}")
    assert f"dataset.root={tmp_path / 'nowhere'} (paths.data): no such folder" in nowhere
    assert not (tmp_path / "chosen").exists()

    shutil.copy(audited / "config.yaml", sent)
    told = OmegaConf.to_container(OmegaConf.load(sent / "overrides.yaml"), resolve=False)
    assert isinstance(told, dict)
    told["choices"]["model"] = "${oc.env:SECRET}"
    (sent / "overrides.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(told)))
    forge(sent)
    folder = launch(None, tmp_path / "out", "training=none", f"weights={sent}")
    assert "hunter2" not in (folder / "results.json").read_text()
    assert "hunter2" not in str(folder)


def test_plan_prints_configuration_and_folder(say: Say, audited: Path, tmp_path: Path) -> None:
    said = say("plan", "scale=tiny", f"paths.outputs={tmp_path}", "activation=relu")
    assert "epochs: 2\n" in said
    assert said.strip().endswith(": not started")
    assert list(tmp_path.iterdir()) == []
    judging = say("plan", "training=none", f"weights={audited}", f"paths.outputs={tmp_path}")
    assert "kwta_exp.models.MLP" in judging
    assert "activation.rato" in say("plan", "activation.rato=0.1")


def test_environment_variable_sets_the_outputs_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert composed([])[0].paths.outputs == "outputs"
    monkeypatch.setenv("KWTA_EXP_OUTPUTS", "/elsewhere")
    assert composed([])[0].paths.outputs == "/elsewhere"


def test_wheel_has_the_configuration_and_both_commands(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    (entry_points,) = (tmp_path / "installed").glob("*.dist-info/entry_points.txt")
    assert "kwta-exp = kwta_exp.cli:main" in entry_points.read_text()
    for words in (["plan", "scale=tiny"], ["run", "--cfg", "job"], ["run", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "kwta_exp", *words],
            capture_output=True, text=True, cwd=tmp_path, check=False,
            env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "kwta" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", "nowhere"], "weights=nowhere: no such file"),
        (["compare", "nowhere", "nowhere"], "nowhere"),
        (["curve", "nowhere"], "nowhere"),
        (["transfer", "nowhere"], "weights=nowhere: no such file"),
        (["plan", "dataset=imagenet"], "dataset/imagenet"),
    ],
)
def test_mistake_gives_one_message(say: Say, words: list[str], message: str) -> None:
    said = say(*words)
    assert message in said
    assert "Traceback" not in said
