"""Presets build; each network family and objective runs end to end at scale=tiny."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from safetensors.numpy import load_file, save_file

from kwta_exp.adjust import scaled
from kwta_exp.checkpoint import save_weights, weights_of
from kwta_exp.config import ConfigError, build, plain, settings
from kwta_exp.errors import UserError
from kwta_exp.evaluation.stored import Stored
from kwta_exp.experiment import run
from kwta_exp.plan import plan_to_judge
from kwta_exp.report.compare import compare
from kwta_exp.sealed import write_arrays
from kwta_exp.verify import verify
from tests.conftest import ROOT
from tests.stored import forge

EXPERIMENTS = ROOT / "conf" / "experiment"
PRESETS = sorted(str(path.relative_to(EXPERIMENTS).with_suffix("")) for path in EXPERIMENTS.rglob("*.yaml"))

Tiny = Callable[..., dict[str, Any]]


@pytest.fixture
def tiny(composed: Callable[..., DictConfig], tmp_path: Path) -> Tiny:
    """Run the overrides at scale=tiny in this process and return results.json."""

    def go(*overrides: str) -> dict[str, Any]:
        cfg = composed(
            "scale=tiny", "runtime=cpu", "runtime.threads=1", f"paths.outputs={tmp_path / 'out'}",
            f"paths.data={tmp_path}", *overrides,
        )  # fmt: skip
        HydraConfig.instance().set_config(cfg)
        run(cfg)
        results = max((tmp_path / "out").glob("*/*/results.json"), key=lambda path: path.stat().st_mtime_ns)
        found: dict[str, Any] = json.loads(results.read_text())
        return found

    return go


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_and_has_a_complete_header(
    composed: Callable[..., DictConfig], preset: str
) -> None:
    header = "".join(
        line for line in (EXPERIMENTS / f"{preset}.yaml").read_text().splitlines(True) if line.startswith("#")
    )
    for word in ("Claim:", "Command:", "Cost:", "Expected:"):
        assert f"# {word}" in header
    assert re.search(rf"experiment={preset}\b", header)
    cfg = composed(f"experiment={preset}")
    for node in (
        "threat",
        *(["training"] if cfg.training.get("_target_") else []),
        "runtime",
        "dataset",
        "sparsity",
        *(f"attack.{name}" for name in cfg.attack),
    ):
        build(cfg, node)
    for node in ("activation", "model", "optimizer", "lr_schedule"):
        assert callable(build(cfg, node))


def commands(preset: str) -> list[list[str]]:
    """The overrides of every command line in a preset's header, with placeholders filled in."""
    header = re.sub(r"^#", "", (EXPERIMENTS / f"{preset}.yaml").read_text().split("defaults:")[0], flags=re.M)
    written = header.split("Command:")[1].split("Cost:")[0].replace("\\\n", " ")
    lines = re.findall(r"python run\.py (.*)", re.sub(r"\([^)]*(\)|$)", "", written))
    placed = [re.sub(r"\b(DIR|RUN_FOLDER|[\w.]+\.(?:npz|pth))\b", "placeholder", line) for line in lines]
    return [[each for each in shlex.split(line) if each != "-m"] for line in placed]


def with_every_value(jobs: list[list[str]]) -> list[list[str]]:
    """Jobs of a grid that together contain every override."""
    seen: set[str] = set()
    found = []
    for job in jobs:
        if not seen.issuperset(job):
            found.append(job)
            seen |= {*job}
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_every_command_in_a_header_composes(composed: Callable[..., DictConfig], preset: str) -> None:
    found = commands(preset)
    assert any(f"experiment={preset}" in overrides for overrides in found)
    for overrides in found:
        swept = composed(*(o for o in overrides if o.startswith("experiment="))).hydra.sweeper.params or {}
        (jobs,) = BasicSweeper.split_arguments(
            OverridesParser.create().parse_overrides([*overrides, *(f"{k}={v}" for k, v in swept.items())]),
            None,
        )
        for job in with_every_value(jobs):
            cfg = composed(*job)
            assert settings(cfg)
            nodes = ["sparsity", "threat", "model", *(f"attack.{name}" for name in cfg.attack)]
            for node in [*nodes, *(["training"] if cfg.training.get("_target_") else [])]:
                build(cfg, node)


FAMILIES = [
    ["model=cnn"], ["model=mlp"], ["dataset=cifar10", "model=resnet50"], ["dataset=svhn", "model=wrn"],
    ["dataset=cifar100", "model=densenet"], ["dataset=mnist", "model=vgg"],
    ["dataset=cifar10", "model=torchvision", "model.name=mobilenet_v3_small"],
    ["dataset=image_folder", "model=resnet_imagenet"],
    ["model=convert", "model.network={_target_: kwta_exp.models.CNN, _partial_: true, channels: [4, 4, 4, 4],"
     " hidden: 8, activation: {_target_: torch.nn.ReLU, _partial_: true}}"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", FAMILIES, ids=" ".join)
def test_each_network_family_runs_end_to_end(tiny: Tiny, overrides: list[str]) -> None:
    results = tiny(*overrides)
    assert results["run"]["scale"] == "tiny"
    assert results["run"]["name"].startswith("tiny-")
    assert ("synthetic" in results["run"]) == any("dataset=" in override for override in overrides)
    assert results["attacks"]["bpda"]["activations_replaced"] >= 2
    assert results["worst_case"]["n"] == 64
    assert (
        results["attacks"]["pgd"]["forwards"] > 0
    )  # at least one image was classified correctly, and attacked


@pytest.mark.parametrize("training", ["natural", "pgd", "trades", "free", "fast", "mart", "alp"])
def test_each_objective_runs_end_to_end(tiny: Tiny, training: str, tmp_path: Path) -> None:
    results = tiny(f"training={training}", "training.ema_decay=0.5", "training.clip_norm=1.0",
                   "training.label_smoothing=0.1", "runtime.channels_last=true",
                   "runtime.precision=bf16-mixed")  # fmt: skip
    assert results["run"]["training"] == training
    assert results["attacks"]["pgd"]["forwards"] > 0
    (metrics,) = (tmp_path / "out").glob("*/*/metrics.jsonl")
    epochs = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    assert all(("val_robust_accuracy" in epoch) == (training != "natural") for epoch in epochs)


SMALLER = {"audit/kwta_resnet18": ["model.width=4"], "audit/stochastic_lwta": ["model.depth=10"]}
"""For presets of given weights: a smaller network than the published one, with random weights."""


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_end_to_end_at_scale_tiny(
    tiny: Tiny, composed: Callable[..., DictConfig], tmp_path: Path, preset: str
) -> None:
    given = [f"experiment={preset}", *SMALLER.get(preset, [])]
    if not (cfg := composed(*given)).training.get("_target_"):  # training=none
        network = build(cfg, "model")(num_classes=10, in_channels=3)
        save_weights(tmp_path / "w.safetensors", weights_of(network), {})
        given += [f"weights={tmp_path / 'w.safetensors'}", "weights_sha256=null"]
    results = tiny(*given)
    assert results["run"]["scale"] == "tiny"
    assert 50 <= results["clean"]["n"] <= 64
    assert not results["attacks"] or results["attacks"]["pgd"]["forwards"] > 0


def test_adversarial_training_accepts_bpda(tiny: Tiny) -> None:
    adaptive = ["training=pgd", "attack@training.attack=bpda_inner"]
    results = tiny(*adaptive)
    assert results["attacks"]["bpda"]["activations_replaced"] >= 2
    with pytest.raises(
        ConfigError, match=r"training\.attack: BPDA cannot attack .*: the network has no winner"
    ):
        tiny(*adaptive, "activation=relu")


def test_evaluation_uses_the_ratio_reached_in_training(tiny: Tiny, tmp_path: Path) -> None:
    schedule = ["sparsity=linear", "sparsity.final=0.3", "sparsity.over=1.0", "activation.ratio=0.5"]
    trained = tiny(*schedule)
    assert trained["run"]["name"] == "tiny-digits-cnn-kwta0.5to0.3-natural"
    (folder,) = (tmp_path / "out").glob("*kwta0.5to0.3*/s0-*")
    for source in (folder, folder / "checkpoints" / "best.safetensors"):
        judged = tiny("training=none", f"weights={source}")
        assert judged["run"]["name"] == "tiny-digits-cnn-kwta0.3-none"
        assert judged["attacks"]["pgd"]["robust_accuracy"] == trained["attacks"]["pgd"]["robust_accuracy"]
    other = tiny("training=none", f"weights={folder}", "activation.ratio=0.9")
    assert other["run"]["name"] == "tiny-digits-cnn-kwta0.9-none"

    def margins(name: str) -> list[float]:
        with np.load(next((tmp_path / "out").glob(f"*{name}*/s0-*/evaluation/*/clean.npz"))) as file:
            found: list[float] = file["margin"].tolist()
            return found

    assert margins("kwta0.3-none") == margins("kwta0.5to0.3-natural") != margins("kwta0.9-none")
    # Fine-tuning starts at the schedule's own ratio.
    tuned = tiny("sparsity=incremental", "activation.ratio=0.3", f"weights={folder}")
    assert tuned["run"]["name"] == "tiny-digits-cnn-kwta0.3to0.08-natural"


def test_evaluating_weights_with_another_activation_is_refused(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny("suite=none")
    (folder,) = (tmp_path / "out").glob("tiny-digits-cnn-kwta0.1-natural/s0-*")
    for source in (folder, folder / "checkpoints" / "best.safetensors"):
        with pytest.raises(
            ConfigError,
            match=r"activation\._target_=torch\.nn\.ReLU: .* was trained with kwta_exp\.activations\.KWTA",
        ):
            tiny("training=none", f"weights={source}", "activation=relu", "suite=none")
    assert "trained with another activation" not in caplog.text
    tiny("training=none", f"weights={folder}", "activation=kwta_channel", "suite=none")
    assert "trained with another activation than this network has: over=volume, here channel" in caplog.text
    caplog.clear()
    tiny(f"weights={folder}", "activation=relu", "suite=none")  # to train on with another one is allowed
    assert "_target_=kwta_exp.activations.KWTA, here torch.nn.ReLU" in caplog.text


def test_foreign_weights_are_evaluated_with_any_activation(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = ["model=mlp", "model.hidden=[4]", "suite=none"]
    tiny(*network)
    (best,) = (tmp_path / "out").glob("*/*/checkpoints/best.safetensors")
    for metadata in (None, {"activation": "relu"}, {"activation": "[1]"}, {"activation": "{"}):
        foreign = tmp_path / "foreign.safetensors"
        save_file(load_file(best), foreign, metadata=metadata)
        tiny("training=none", f"weights={foreign}", "activation=relu", *network)
    assert "trained with" not in caplog.text


def test_scale_logs_its_changes(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tiny("training.epochs=30", "training.batch_size=8", "suite=none")
    (line,) = [message for message in caplog.messages if message.startswith("scale=tiny: ")]
    assert "training.epochs 30 -> 2" in line
    assert "evaluation.n null -> 64" in line
    assert "training.batch_size" not in line  # below its cap


def test_user_attack_gets_eps_as_a_number(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_attack.py").write_text(
        "class Up:\n"
        "    def __init__(self, eps, step): self.change = eps + 0 * step\n"
        "    def __call__(self, model, x, y, keys): return x + self.change\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = "+attack.up={_target_: own_attack.Up, eps: '${threat.eps}', step: 2/255}"
    for eps in ("8/255", "' 8 / 255'", str(8 / 255)):
        results = tiny("suite=none", own, f"threat.eps={eps}")
        assert results["threat"]["eps"] == 8 / 255
        assert results["attacks"]["up"]["eps"] == 8 / 255
    assert len(list((tmp_path / "out").glob("*/*/evaluation/*"))) == 1  # all three are the same evaluation


def test_dataset_of_another_class_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_data.py").write_text("class Data:\n    def __init__(self, **anything): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"dataset\._target_=own_data\.Data: makes a Data; expected a kwta"):
        tiny("++dataset={_target_: own_data.Data}")


def test_sparsity_schedule_without_kwta_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="sparsity=incremental: the network has no k-WTA layer with a ratio"):
        tiny("activation=relu", "sparsity=incremental", "sparsity.start=0.2")


def test_transfer_attack_uses_the_source_run(tiny: Tiny, tmp_path: Path) -> None:
    tiny("activation=relu")
    (source,) = (tmp_path / "out").glob("*relu*/s0-*")
    overrides = ["+attack@attack.transfer=transfer", f"attack.transfer.source={source}"]
    results = tiny(*overrides)
    assert results["attacks"]["transfer"]["source"] == str(source)
    assert results["attacks"]["transfer"]["forwards"] == 0
    # The weights of the source identify it, not its path.
    moved = source.rename(source.with_name("moved"))
    again = tiny(overrides[0], f"attack.transfer.source={moved}")
    assert again["attacks"]["transfer"] == results["attacks"]["transfer"]
    with pytest.raises(ConfigError, match=r"attack\.transfer\.source=nowhere: no finished training there"):
        tiny(overrides[0], "attack.transfer.source=nowhere")
    with pytest.raises(ConfigError, match=r"attack\.transfer\.source=null: expected the run folder"):
        tiny(overrides[0], "scale=full", "dataset=synthetic")


def test_caps_apply_at_any_depth(composed: Callable[..., DictConfig]) -> None:
    cfg = scaled(
        composed("scale=tiny", "training=pgd", "model=densenet", "dataset.train_n=7", "attack.pgd.restarts=9")
    )
    assert cfg.training.epochs == cfg.lr_schedule.T_max == 2
    assert plain(cfg, "training.attack.steps") == plain(cfg, "attack.fgsm.steps") + 2 == 3
    assert cfg.attack.pgd.restarts == 1
    assert cfg.model.growth == 4  # null counts as larger
    assert (cfg.dataset.train_n, cfg.evaluation.n) == (7, 64)
    cnn = composed("scale=tiny")
    assert scaled(cnn).model.channels == [4, 4, 4, 4]
    assert cnn.model.channels == [32, 32, 64, 64]
    full = composed("model=densenet")
    assert scaled(full) == full


def test_scale_tiny_uses_real_data_if_present(tiny: Tiny, arrays_file: Path) -> None:
    assert "synthetic" not in tiny("dataset=arrays", f"dataset.path={arrays_file}")["run"]


@pytest.mark.parametrize(("overrides", "message"), [
    (["dataset=arrays", "dataset.path=absent.npz"], r"dataset\.path=absent\.npz: no such file"),
    (["dataset=image_folder", "dataset.root=absent"], r"dataset\.root=absent: no folder absent"),
])  # fmt: skip
def test_missing_data_at_a_given_path_is_an_error_at_scale_tiny(
    tiny: Tiny, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(*overrides)


def verify_again(folder: Path) -> list[str]:
    """What ``kwta-exp verify FOLDER`` says."""
    return verify(plan_to_judge(folder, [], None, False), folder)


def test_verify_recomputes_the_worst_case_and_detects_changes(tiny: Tiny, tmp_path: Path) -> None:
    results = tiny("evaluation.save_images=true", "training.epochs=2", "dataset=synthetic", "model=mlp")
    (folder,) = (tmp_path / "out").glob("*/s0-*")
    (said,) = verify_again(folder)
    assert f"worst case {100 * results['worst_case']['robust_accuracy']:.2f}% (n = 64)" in said

    (evaluation,) = (folder / "evaluation").iterdir()
    path = evaluation / "results.json"
    honest = path.read_text()
    better = json.loads(honest)
    better["worst_case"]["robust_accuracy"] += 1 / 64
    path.write_text(json.dumps(better))
    forge(folder)
    with pytest.raises(UserError, match=r"but results\.json says"):
        verify_again(folder)
    path.write_text(honest)

    images = next((evaluation / "images").glob("fgsm-*.npz"))
    with np.load(images) as file:
        index, x_adv = file["index"], file["x_adv"]
    write_arrays(images, {"index": index, "x_adv": 1 - x_adv})
    with pytest.raises(UserError, match=rf"missing or changed .*: images/{images.name}"):
        verify_again(folder)
    forge(folder)
    with pytest.raises(UserError, match=r"holds images outside linf eps"):
        verify_again(folder)
    for kept in (evaluation / "images").iterdir():
        kept.unlink()
    (evaluation / "images").rmdir()
    with pytest.raises(UserError, match=r"missing or changed since results\.json was written: images/"):
        verify_again(folder)


def test_compare_reads_the_records_of_two_runs(tiny: Tiny, tmp_path: Path) -> None:
    for activation in ("kwta", "relu"):
        tiny(f"activation={activation}", "model=mlp")
    kwta, relu = (Stored.read(next((tmp_path / "out").glob(f"*{name}*/s0-*"))) for name in ("kwta", "relu"))
    assert "n = 64" in compare(kwta, relu)
    results = json.loads(next((tmp_path / "out").glob("*relu*/s0-*/results.json")).read_text())
    assert relu.outcome.robust.mean() == results["worst_case"]["robust_accuracy"]
    assert relu.outcome.clean_correct.mean() == results["clean"]["accuracy"]


EVIL = "{_target_: pathlib.Path.touch, _args_: [{_target_: pathlib.Path, _args_: [%s]}]}"


@pytest.mark.parametrize("how", ["resolver", "elsewhere", "group", "data"])
def test_interpolations_of_an_untrusted_folder_are_not_resolved(tiny: Tiny, tmp_path: Path, how: str) -> None:
    """An interpolation can turn a text into a target, after the targets were checked."""
    tiny("model=mlp", "evaluation.save_images=true")
    (folder,) = (tmp_path / "out").glob("*/s0-*")
    proof = tmp_path / "code-ran"
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)
    assert isinstance(config, dict)
    evil = OmegaConf.to_container(OmegaConf.create(EVIL % proof))
    made = "${oc.create:" + EVIL % proof + "}"
    if how == "resolver":
        config["model"]["hidden"] = made
    elif how == "elsewhere":
        config["model"]["hidden"], config["evil"] = "${evil}", evil
    elif how == "group":
        config["model"], config["evil"] = "${evil}", evil
    else:
        config["paths"]["data"] = made
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    forge(folder)
    audit = ["training=none", f"weights={folder}"]
    if how == "data":  # a path of the folder is never used
        tiny(*audit, "suite=none")
        verify_again(folder)
        assert not proof.exists()
        return
    for overrides in (
        audit,
        ["+attack@attack.transfer=transfer", f"attack.transfer.source={folder}", "model=cnn"],
    ):
        with pytest.raises(
            ConfigError, match=r"interpolations of a run folder are not resolved|not one that a run of this"
        ):
            tiny(*overrides)
    with pytest.raises(
        UserError, match=r"interpolations of a run folder are not resolved|not one that a run of this"
    ):
        verify_again(folder)
    assert not proof.exists()


def test_scale_tiny_keeps_the_network_size_of_full_weights(tiny: Tiny, tmp_path: Path) -> None:
    small = ["model=mlp", "model.hidden=[24]"]
    tiny(*small, "scale=full", "training.epochs=1", "suite=none", "evaluation.n=8")
    (folder,) = (tmp_path / "out").glob("digits*/s0-*")
    assert tiny("training=none", f"weights={folder}")["run"]["scale"] == "tiny"
    assert tiny(*small, f"weights={folder}")["run"]["scale"] == "tiny"


def test_scale_tiny_replaces_nes(tiny: Tiny) -> None:
    found = tiny("suite=none", "+attack@attack.nes=nes", "model=mlp")["attacks"]["nes"]
    assert 0 < found["forwards"] <= 64 * (3 * 8 + 4)


def test_scale_tiny_runs_on_synthetic_images(tiny: Tiny) -> None:
    assert tiny("dataset=synthetic", "model=densenet", "suite=none")["clean"]["n"] == 64


def test_inner_attack_can_be_any_attack(tiny: Tiny, tmp_path: Path) -> None:
    assert tiny("training=pgd", "attack@training.attack=mim", "model=mlp")["run"]["training"] == "pgd"
    deepfool = ["model=mlp", "training=fast", "attack@training.probe=hopskipjump", "training.epochs=1"]
    assert tiny(*deepfool)["run"]["training"] == "fast"
    (source,) = (tmp_path / "out").glob("*-pgd/s0-*")
    transferred = ["training=pgd", "attack@training.attack=transfer", f"training.attack.source={source}"]
    assert tiny(*transferred, "model=mlp")["run"]["training"] == "pgd"
    with pytest.raises(ConfigError, match=r"training\.probe: BPDA cannot attack this network"):
        tiny("training=free", "attack@training.probe=bpda_inner", "activation=relu")


def test_diverging_training_with_clipping_is_an_error(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="training diverged in epoch 1"):
        tiny("model=mlp", "training.clip_norm=1", "optimizer.lr=1e20")


@pytest.mark.parametrize(("override", "message"), [
    ("scale.caps.steps=abc", r"scale\.caps\.steps='abc': expected a valid integer"),
    ("scale.caps=null", r"scale\.caps=None"),
    ("attack.pgd=null", r"attack\.pgd: nothing to build"),
])  # fmt: skip
def test_null_and_text_in_odd_places_give_one_message(tiny: Tiny, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(override)


def test_sparsity_schedule_that_misses_its_final_ratio_is_refused(
    composed: Callable[..., DictConfig], tiny: Tiny
) -> None:
    with pytest.raises(
        ConfigError, match=r"sparsity\.final=0\.1: is not reached, the last of 30 epochs has 0\.13"
    ):
        tiny("scale=full", "activation.ratio=0.2", "sparsity=incremental", "sparsity.final=0.1")


def test_weights_sha256_is_checked_for_a_run_folder(tiny: Tiny, tmp_path: Path) -> None:
    tiny("model=mlp")
    (folder,) = (tmp_path / "out").glob("*/s0-*")
    with pytest.raises(ConfigError, match=r"weights_sha256=0{64}"):
        tiny("training=none", f"weights={folder}", f"weights_sha256={'0' * 64}")
