"""Presets of published defences: what they plan, and a network of each kind from run.py to its results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kwta_exp.activations import KWTA, MeanSparse, StochasticLWTA
from kwta_exp.checkpoint import save_weights, weights_of
from kwta_exp.config import build, composed, plain
from kwta_exp.errors import UserError
from kwta_exp.models import WideResNet
from kwta_exp.plan import Plan
from kwta_exp.storage import sha256_of_file
from tests.conftest import ROOT, run_py_forked

AUDITS = sorted(path.stem for path in (ROOT / "conf" / "experiment" / "audit").glob("*.yaml"))

EXPECTED = {
    "kwta_resnet18": ("cifar10", "resnet18", "kwta", "none", KWTA, 8 / 255),
    "mean_sparse": ("digits", "cnn", "mean_sparse", "natural", MeanSparse, 0.1),
    "stochastic_lwta": ("cifar10", "wrn", "lwta_stochastic", "none", StochasticLWTA, 0.031),
}


def published(path: Path) -> Path:
    """Weights of a Wide ResNet of depth 10, with the unused group of the published file."""
    torch.manual_seed(0)
    weights = weights_of(WideResNet(StochasticLWTA, num_classes=10, in_channels=3, depth=10, widen_factor=1))
    weights |= {f"sub_{name}": tensor + 1 for name, tensor in weights.items() if name.startswith("block1.")}
    save_weights(path, weights, {})
    return path


def planned(*overrides: str) -> Plan:
    return Plan.of(*composed([*overrides, "runtime=cpu", "scale=tiny"], None))


@pytest.mark.parametrize("preset", AUDITS)
def test_every_audit_plans_what_its_header_says(preset: str, tmp_path: Path) -> None:
    dataset, model, activation, training, kind, eps = EXPECTED[preset]
    file = published(tmp_path / "w.safetensors")
    given = [f"weights={file}", "weights_sha256=null"] if training == "none" else []
    plan = planned(f"experiment=audit/{preset}", f"paths.outputs={tmp_path}", f"paths.data={tmp_path}", *given)
    groups = {"dataset": dataset, "model": model, "activation": activation, "training": training}
    assert {group: plan.chosen[group] for group in groups} == groups
    assert plan.chosen["suite"] == "strong"
    assert plan.weights == (file if given else None)
    assert plan.trains == (training == "natural")
    assert isinstance(build(plan.cfg, "activation")(), kind)
    threat = build(plan.cfg, "threat")
    assert (threat.norm, threat.eps) == ("linf", pytest.approx(eps))


@pytest.mark.parametrize("preset", [name for name, expected in EXPECTED.items() if expected[3] == "none"])
def test_other_weights_than_the_published_are_refused(preset: str, tmp_path: Path) -> None:
    file = published(tmp_path / "w.safetensors")
    with pytest.raises(
        UserError, match=rf"weights_sha256=[0-9a-f]{{64}}: .* has SHA-256 {sha256_of_file(file)}"
    ):
        planned(f"experiment=audit/{preset}", f"weights={file}", f"paths.outputs={tmp_path}")


def test_the_published_kwta_network_is_named_by_its_address_and_its_hash() -> None:
    cfg, _ = composed(["experiment=audit/kwta_resnet18"], None)
    assert cfg.weights.startswith("https://github.com/wielandbrendel/robustness_workshop/releases/download/")
    assert cfg.weights_sha256 == "112d953be871c3991117f8ba1599e978623352f70800c3a4d91aa434039c72de"
    attacks = plain(cfg, "attack")
    assert {"autoattack", "bpda", "es", "smoothed", "square"} <= attacks.keys()  # those of strong,
    assert (attacks["pgd"]["restarts"], attacks["bpda"]["restarts"]) == (10, 12)  # at paper/refutation's effort


def run(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    """A run at scale=tiny, and its results.json."""
    done = run_py_forked(
        *overrides, "suite=quick", "scale=tiny", "runtime=cpu", "runtime.threads=1",
        f"paths.outputs={tmp_path / 'out'}", f"paths.data={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").glob("*/*/results.json")
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def test_published_weights_of_stochastic_lwta_run_end_to_end(tmp_path: Path) -> None:
    file = published(tmp_path / "w.safetensors")
    own = [f"weights={file}", "weights_sha256=null", "model.depth=10", "evaluation.n=24"]
    results = run(tmp_path, "experiment=audit/stochastic_lwta", *own)
    assert results["run"]["name"] == "tiny-cifar10-wrn-lwta_stochastic2-none"
    assert results["run"]["source_sha256"] == sha256_of_file(file) != results["run"]["weights_sha256"]
    assert results["attacks"]["pgd"]["forwards"] > 0
    assert results["attacks"]["bpda"]["operators_relaxed"]["softmax"] == 7
    assert 0 <= results["clean"]["over_draws"]["accuracy"] <= 1


@pytest.mark.parametrize(("activation", "layers"), [("lwta_stochastic", 7), ("mean_sparse", 7)])
def test_a_wide_resnet_is_trained_and_attacked(tmp_path: Path, activation: str, layers: int) -> None:
    network = ["dataset=cifar10", "model=wrn", "model.depth=10", "model.widen_factor=1"]
    results = run(tmp_path, *network, f"activation={activation}", "training=natural")
    assert results["run"]["training"] == "natural"
    assert results["attacks"]["pgd"]["forwards"] > 0
    cfg, _ = composed([*network, f"activation={activation}"], None)
    built = build(cfg, "model")(num_classes=10, in_channels=3)
    kinds = (StochasticLWTA, MeanSparse)
    assert sum(isinstance(module, kinds) for module in built.modules()) == layers
    assert not any(isinstance(module, nn.ReLU) for module in built.modules())


def test_a_mean_sparse_network_is_judged_again_as_it_was_trained(tmp_path: Path) -> None:
    trained = run(tmp_path / "first", "experiment=audit/mean_sparse")
    (folder,) = (tmp_path / "first" / "out").glob("tiny-digits-cnn-mean_sparse-natural/s0-*")
    again = run(tmp_path / "second", "training=none", f"weights={folder}")
    assert again["run"]["activation"] == "mean_sparse"
    for name in ("clean", "worst_case"):
        assert again[name] == trained[name]
