"""The recipes for parts of one's own, replayed from the guide: the new part is really what runs."""

import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from kwta_exp.parts import planned_network
from kwta_exp.plan import plan_to_judge
from tests.conftest import ROOT, run_py_forked
from tests.test_readme import COMMANDS, FILES

SMALL = ["runtime=cpu", "runtime.threads=1", "training.epochs=1", "evaluation.n=16"]

OWN = [line for line in COMMANDS if line.startswith("PYTHONPATH=mine")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.py and the files of the recipes."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "run.py").write_bytes((ROOT / "run.py").read_bytes())
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def replayed(word: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """Run the guide's command that holds ``word``; its run folder and results."""
    (line,) = (line for line in OWN if word in line)
    _, _, _, *overrides = shlex.split(line, comments=True)
    monkeypatch.setenv("PYTHONPATH", "mine")
    outputs = word.replace("=", "-")
    done = run_py_forked(*overrides, *SMALL, f"paths.outputs={outputs}", cwd=workspace)
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (workspace / outputs).glob("*/*/results.json")
    return results.parent, json.loads(results.read_text())


def test_an_activation_of_ones_own(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, results = replayed("squash", workspace, monkeypatch)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["activation"] == {"_target_": "my_layers.Squash", "_partial_": True, "slope": 0.2}
    assert "squash" in results["run"]["name"]
    monkeypatch.syspath_prepend(str(workspace / "mine"))
    from my_layers import Squash

    plan = plan_to_judge(run, ["suite=none"], workspace / "mine", trust=True)
    network = planned_network(plan, plan.dataset.load())
    layers = [layer for layer in network.modules() if isinstance(layer, Squash)]
    assert [layer.slope for layer in layers] == [0.2] * len(layers)
    assert layers
    x = torch.randn(3, 5)
    assert torch.equal(layers[0](x), torch.tanh(0.2 * x))


def test_a_network_of_ones_own(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = replayed("model=small", workspace, monkeypatch)
    weights = load_file(run / "checkpoints" / "best.safetensors")
    assert weights["layers.1.weight"].shape == (32, 64)  # model.width=32 units, 8 x 8 pixels
    assert weights["layers.3.weight"].shape == (10, 32)


def test_a_converted_network(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = replayed("model=convert", workspace, monkeypatch)
    shapes = [tuple(weight.shape) for weight in load_file(run / "checkpoints" / "best.safetensors").values()]
    assert (8, 1, 3, 3) in shapes  # the convolution of Plain
    assert "my_nets.Plain" in (run / "config.yaml").read_text()


def test_an_attack_of_ones_own(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, results = replayed("one_step", workspace, monkeypatch)
    attack = results["attacks"]["one_step"]
    images = round(results["clean"]["accuracy"] * results["clean"]["n"])
    assert attack["eps"] == pytest.approx(8 / 255)
    assert (attack["forwards"], attack["backwards"]) == (images, images)  # one step an image


def test_a_dataset_of_ones_own(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, results = replayed("stripes", workspace, monkeypatch)
    monkeypatch.syspath_prepend(str(workspace / "mine"))
    from my_data import Stripes

    images = Stripes(crop_padding=0, flip=False).load()
    (record,) = run.glob("evaluation/*/clean.npz")
    with np.load(record) as columns:
        index, digests, labels = columns["index"], columns["digest"], columns["label"]
    expected = [hashlib.sha256(images.x_test[i].tobytes()).hexdigest()[:16].encode() for i in index]
    assert digests.tolist() == expected
    assert labels.tolist() == images.y_test[index].tolist()
    assert results["threat"] == {"norm": "linf", "eps": 16 / 255}
    sys.modules.pop("my_data", None)
