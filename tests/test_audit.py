"""audit() gives the command's results for a model in memory, and leaves the caller's objects unchanged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import nn

from kwta_exp.attacks import PGD, Threat
from kwta_exp.audit import audit
from kwta_exp.checkpoint import load_into, read_weights
from kwta_exp.data.datasets import Digits
from kwta_exp.errors import UserError
from kwta_exp.experiment import run
from kwta_exp.models import MLP
from tests.conftest import TINY

THREAT = Threat(norm="linf", eps=0.1)
FEW = ["evaluation.n=40", "evaluation.batch_size=16", "attack.pgd.steps=5", "attack.pgd.restarts=1",
       "attack.bpda.steps=3", "attack.bpda.restarts=2"]  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    images = Digits().load()
    assert isinstance(images.x_test, np.ndarray)
    return images.x_test, images.y_test


def network() -> nn.Module:
    from functools import partial

    from kwta_exp.activations import KWTA

    torch.manual_seed(0)
    return MLP(
        activation=partial(KWTA, ratio=0.1), num_classes=10, in_channels=1, image_size=(8, 8), hidden=[32]
    )


def test_an_audit_gives_the_records_and_results_of_the_command(
    composed: Callable[..., DictConfig], tmp_path: Path, digits: Any
) -> None:
    cfg = composed(*TINY, "evaluation.checks_n=8", f"paths.outputs={tmp_path / 'out'}")
    HydraConfig.instance().set_config(cfg)
    run(cfg)
    (folder,) = (tmp_path / "out").glob("*/s0-*")
    expected = json.loads((folder / "results.json").read_text())
    (commands,) = (folder / "evaluation").iterdir()
    model = network()
    load_into(model, read_weights(folder / "checkpoints" / "best.safetensors"), "best")

    found = audit(
        model, *digits, THREAT, suite="quick", folder=tmp_path / "kept",
        overrides=[*FEW, "evaluation.checks_n=8"],
    )  # fmt: skip

    for results in (found, expected):
        for attack in results["attacks"].values():
            del attack["seconds"]
    for part in ("threat", "clean", "attacks", "worst_case", "inapplicable", "masking"):
        assert found[part] == expected[part], part
    for record in commands.glob("*.npz"):
        with np.load(record) as theirs, np.load(tmp_path / "kept" / record.name) as ours:
            for column in set(theirs.files) - {"seconds", "checksum"}:  # the checksum covers the seconds
                assert np.array_equal(theirs[column], ours[column]), (record.name, column)


def test_float_images_and_own_attacks_are_accepted_and_the_model_is_restored(digits: Any) -> None:
    x, y = digits
    model = network().train()
    next(model.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    suite = {"mine": PGD(norm="linf", eps=0.1, steps=3)}
    settings = ["evaluation.n=30", "evaluation.batch_size=16"]
    as_bytes = audit(model, x, y, THREAT, suite, overrides=settings)
    as_floats = audit(
        model, torch.from_numpy(x).float() / 255, torch.from_numpy(y), THREAT, suite, overrides=settings
    )
    between = audit(model, np.clip(x / 255 + 1e-3, 0, 1), y, THREAT, suite, overrides=settings)
    for results in (as_bytes, as_floats, between):
        results["attacks"]["mine"].pop("seconds")
    assert as_bytes == as_floats
    assert list(as_bytes["attacks"]) == ["mine"]
    assert between["clean"]["n"] == as_bytes["clean"]["n"] == 30
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((4, 8, 8), np.uint8)}, r"^x: has shape \(4, 8, 8\); expected images \(N, C, H, W\)"),
        (
            {"x": np.full((4, 1, 8, 8), 2.0)},
            r"^x: is float64 from 2.0 to 2.0; expected uint8, or floating point",
        ),
        ({"x": np.full((4, 1, 8, 8), np.nan)}, r"^x: is float64 from nan"),
        ({"y": np.array([0, 1, 2])}, r"^y: is int64 \(3,\); expected integers from 0, of shape \(4,\)"),
        (
            {"y": np.array([0, 1, 2, 10])},
            r"^model: returns \(2, 10\) for 2 images, and the largest label is 10",
        ),
        ({"suite": "quik"}, r"quik"),
        ({"overrides": ["evaluation.n=0"]}, r"^evaluation\.n=0: expected greater"),
        ({"overrides": ["attack.pgd.steps=many"]}, r"^attack\.pgd\.steps='many'"),
    ],
)
def test_invalid_arguments_are_one_message(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": np.zeros((4, 1, 8, 8), np.uint8), "y": np.arange(4), "threat": THREAT, "suite": "quick",
    }  # fmt: skip
    with pytest.raises(UserError, match=message):
        audit(network(), **(arguments | change))


def test_hydra_is_left_as_the_application_initialised_it(
    composed: Callable[..., DictConfig], digits: Any
) -> None:
    before = GlobalHydra.instance().hydra
    audit(network(), *digits, THREAT, {}, overrides=["evaluation.n=4"])
    assert GlobalHydra.instance().hydra is before
    assert composed("activation=relu").activation._target_ == "torch.nn.ReLU"
