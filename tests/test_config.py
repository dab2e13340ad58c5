"""Configuration: every YAML lists its target's parameters, every option composes, errors name the key."""

import inspect
from collections.abc import Callable
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from kwta_exp.adjust import adopted, read_fractions
from kwta_exp.checkpoint import save_weights
from kwta_exp.config import CommandLine, build, call, require_threat_and_recipe, settings
from kwta_exp.config import composed as composed_command
from kwta_exp.errors import UserError
from kwta_exp.fields import fraction
from kwta_exp.models.factory import with_facts
from kwta_exp.plan import Plan, run_name
from kwta_exp.recorded import RecordedRun
from kwta_exp.run_folder import RunFolder
from kwta_exp.suggest import mistake
from kwta_exp.trust import TRUSTED, local_code, require_buildable, targets
from tests.conftest import ROOT
from tests.stored import forge

CONF = ROOT / "conf"
COMPLETED = {"num_classes", "in_channels", "image_size"}
"""What the experiment adds to a network, from the data."""


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


GROUPS = ("activation", "model", "dataset", "threat", "sparsity", "training", "attack", "runtime")
OURS = [(g, o) for g in GROUPS
        for o in options(g) if (g, o) != ("training", "none")]  # fmt: skip


QUICK = ("fgsm", "pgd", "bpda")
"""The attacks of the default suite."""


@cache
def nodes() -> dict[tuple[str, str], DictConfig]:
    """The node of every option in :data:`OURS`, in few compositions: each has one option of every group."""
    found = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        attacks = [f"+attack@attack.{option}={option}" for option in options("attack") if option not in QUICK]
        cfg = compose("config", attacks)
        found |= {("attack", option): cfg.attack[option] for option in options("attack")}
        others = {group: [o for g, o in OURS if g == group] for group in GROUPS if group != "attack"}
        for chosen in zip_longest(*others.values()):
            groups = {group: option for group, option in zip(others, chosen, strict=True) if option}
            cfg = compose("config", [f"{group}={option}" for group, option in groups.items()])
            found |= {(group, option): cfg[group] for group, option in groups.items()}
    return found


@pytest.mark.parametrize(("group", "option"), OURS)
def test_yaml_lists_every_tunable(group: str, option: str) -> None:
    node = nodes()[group, option]
    target = get_object(node._target_)
    parameters = set(inspect.signature(target).parameters) - {"self"}
    if group == "model":
        parameters -= COMPLETED
    listed = {str(key) for key in node if not str(key).startswith("_")}
    if node._target_.startswith("kwta_exp."):
        assert listed == parameters
    else:
        assert listed <= parameters


@pytest.mark.parametrize("dataset", options("dataset"))
def test_every_dataset_has_a_threat_and_a_recipe(composed: Callable[..., DictConfig], dataset: str) -> None:
    require_threat_and_recipe(composed(f"dataset={dataset}"), dataset, trains=True)


OWN_DATA = """# @package _global_
dataset: {_target_: kwta_exp.data.datasets.Synthetic, channels: 1, image_size: 8}
"""


def own_dataset(folder: Path, text: str) -> None:
    (folder / "dataset").mkdir()
    (folder / "dataset" / "mine.yaml").write_text(text)


def test_one_yaml_holds_a_dataset_with_its_threat_and_recipe(tmp_path: Path) -> None:
    own_dataset(
        tmp_path, OWN_DATA + "threat: {norm: l2, eps: 0.7}\nrecipe: {epochs: 4, batch_size: 9, lr: 0.2}\n"
    )
    cfg = Plan.of(*composed_command(["dataset=mine", "recipe.batch_size=8"], tmp_path)).cfg
    assert (cfg.threat.norm, cfg.threat.eps, cfg.attack.pgd.eps) == ("l2", 0.7, 0.7)
    assert (cfg.training.epochs, cfg.training.batch_size, cfg.optimizer.lr) == (4, 8, 0.2)
    other = Plan.of(*composed_command(["dataset=mine", "threat=linf", "threat.eps=3/255"], tmp_path)).cfg
    assert (other.threat.norm, other.threat.eps) == ("linf", 3 / 255)


@pytest.mark.parametrize(("text", "given", "message"), [
    (OWN_DATA, ["threat=l2"], "^recipe.batch_size, recipe.epochs, recipe.lr: not set by dataset=mine;"),
    (OWN_DATA, ["recipe.epochs=1", "recipe.batch_size=8", "recipe.lr=0.1"],
     "^threat.eps, threat.norm: not set by dataset=mine; expected threat=linf or threat=l2, or"),
    (OWN_DATA + "threat: {norm: linf}\n", ["scale=tiny"], "^threat.eps: not set by dataset=mine; expected"),
])  # fmt: skip
def test_a_dataset_without_a_threat_or_a_recipe_is_refused(
    text: str, given: list[str], message: str, tmp_path: Path
) -> None:
    own_dataset(tmp_path, text)
    with pytest.raises(UserError, match=message):
        Plan.of(*composed_command(["dataset=mine", *given], tmp_path))


def test_evaluating_needs_no_recipe(tmp_path: Path) -> None:
    own_dataset(tmp_path, OWN_DATA)
    save_weights(tmp_path / "net.safetensors", {"weight": torch.zeros(1)}, {})
    given = ["dataset=mine", "threat=linf", "training=none", f"weights={tmp_path / 'net.safetensors'}"]
    assert Plan.of(*composed_command(given, tmp_path)).chosen["dataset"] == "mine"


def test_planning_does_not_change_the_composed_configuration() -> None:
    cfg, line = composed_command(["scale=tiny", "dataset=cifar10"])
    before = OmegaConf.to_yaml(cfg)
    plan = Plan.of(cfg, line)
    assert OmegaConf.to_yaml(cfg) == before
    assert plan.cfg.training.epochs == 2


@pytest.mark.parametrize("group", ["optimizer", "lr_schedule", "point", "suite", "scale"])
def test_every_option_composes(composed: Callable[..., DictConfig], group: str) -> None:
    for option in options(group):
        cfg = composed(f"+{group}={option}" if group == "point" else f"{group}={option}")
        if group in ("optimizer", "lr_schedule"):
            optimizer = build(cfg, "optimizer")([torch.nn.Parameter(torch.zeros(1))])
            if group == "lr_schedule":
                build(cfg, "lr_schedule")(optimizer)


def test_files_are_shorter_than_a_screen() -> None:
    for path in CONF.rglob("*.yaml"):
        assert len(path.read_text().splitlines()) <= 45, path
        yaml.safe_load(path.read_text())


@pytest.mark.parametrize(("overrides", "key", "message"), [
    (["activation.ratio=2"], "activation", r"activation\.ratio=2: expected less than or equal to 1"),
    (["activation.ratio=true"], "activation", r"activation\.ratio=True: expected a valid number"),
    (["activation.over=rows"], "activation", r"activation\.over='rows': expected 'volume' or 'channel'"),
    (["activation.k=5"], "activation", r"activation: KWTA takes either ratio or k, got ratio=0.1 and k=5"),
    (["+activation.rate=1"], "activation", r"activation\.rate: unknown key"),
    (["activation._target_=no.Net"], "activation", r"activation\._target_=no\.Net: cannot be imported"),
    (["threat.eps=-1"], "threat", r"threat\.eps=-1: expected greater than or equal to 0"),
    (["threat.eps=8/0"], "threat", r"threat\.eps='8/0': expected a valid number"),
    (["threat.norm=l7"], "threat", r"threat\.norm='l7': expected 'linf' or 'l2'"),
    (["training=pgd", "training.attack.steps=0"], "training", r"training\.attack\.steps=0: expected greater"),
    (["optimizer.lr=-3"], "optimizer", r"optimizer\.lr=-3: Invalid learning rate"),
    (["optimizer.lr=fast"], "optimizer", r"optimizer\.lr='fast': expected a number"),
    (["optimizer.nesterov=1"], "optimizer", r"optimizer\.nesterov=1: expected true or false"),
    (["lr_schedule.T_max=long"], "lr_schedule", r"lr_schedule\.T_max='long': expected a number"),
    (["model.hidden=x"], "model", r"model\.hidden='x': expected a valid integer"),
    (["model.channels=[8,8,8]"], "model", r"model\.channels=\[8, 8, 8\]: List should have at least 4"),
    (["dataset.val_fraction=1"], "dataset", r"dataset\.val_fraction=1: expected less than 1"),
    (["runtime.precision=fp8"], "runtime", r"runtime\.precision='fp8': expected '32-true'"),
    (["runtime.threads=0"], "runtime", r"runtime\.threads=0"),
    (["dataset=arrays"], "dataset", r"dataset\.path"),
])  # fmt: skip
def test_error_names_key_value_and_expectation(
    composed: Callable[..., DictConfig], overrides: list[str], key: str, message: str
) -> None:
    from omegaconf.errors import OmegaConfBaseException

    def make() -> None:
        cfg = composed(*overrides)
        built = build(cfg, key)
        arguments: Any = ([torch.nn.Parameter(torch.zeros(1))],) if key == "optimizer" else ()
        facts = {"num_classes": 10, "in_channels": 1, "image_size": (8, 8)} if key == "model" else {}
        if callable(built):
            call(cfg, key, built, *arguments, **facts)

    with pytest.raises((UserError, OmegaConfBaseException), match=message):
        make()


@pytest.mark.parametrize(("override", "message"), [
    ("seed=-1", r"^seed=-1: expected greater than or equal to 0"),
    ("seed=one", r"^seed='one': expected a valid integer"),
    ("evaluation.n=0", r"^evaluation\.n=0: expected greater"),
    ("evaluation.batch_size=1.5", r"^evaluation\.batch_size=1\.5: expected a valid integer"),
    ("rerun=maybe", r"^rerun='maybe': expected a valid boolean"),
    ("paths.outputs=null", r"^paths\.outputs=None: expected a valid string"),
])  # fmt: skip
def test_top_level_keys_are_checked(composed: Callable[..., DictConfig], override: str, message: str) -> None:
    cfg = composed(override)
    with pytest.raises(UserError, match=message):
        settings(cfg)


@pytest.mark.parametrize(("overrides", "message"), [
    (["+weigths=net.pth"], r"^weigths: unknown key; did you mean weights\?; expected one of weights,"),
    (["~optimizer"], r"^optimizer=None: expected optimizer=OPTION"),
    (["recipe=cifar10"], r"^recipe='cifar10': expected recipe\.epochs=N, recipe\.batch_size=N and"),
])  # fmt: skip
def test_missing_nodes_and_unknown_keys_are_refused(
    composed: Callable[..., DictConfig], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        settings(composed(*overrides))


@pytest.mark.parametrize(("written", "number"), [
    ("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("0.5/2", 0.25), ("8/0", "8/0"), ("a/b", "a/b"),
    ("8/255/2", "8/255/2"),
    ("-8/255", "-8/255"), ("runs/8", "runs/8"), (3, 3), (None, None), ("1./.", "1./."),
])  # fmt: skip
def test_only_fractions_are_converted_to_numbers(written: object, number: object) -> None:
    assert fraction(written) == number


def test_interpolations_of_fractions_give_numbers(composed: Callable[..., DictConfig]) -> None:
    cfg = read_fractions(
        composed("threat.eps=8/255", "+attack.own={radii: [1/2, {a: 3/4}], eps: '${threat.eps}'}")
    )
    assert cfg.threat.eps == cfg.attack.own.eps == cfg.attack.pgd.eps == 8 / 255
    assert cfg.attack.own.radii == [0.5, {"a": 0.75}]


@pytest.mark.parametrize(("content", "message"), [
    ({"_target_": 3}, r"^it\._target_=3: expected the dotted path"),
    ({"_target_": "os.remove"}, r"^it\._target_=os\.remove: nothing in Python's standard library"),
    ({"a": [{"b": {"_target_": "shutil.rmtree"}}]}, r"^it\.a\.0\.b\._target_=shutil\.rmtree: nothing in"),
    ({"_partial_": 1}, r"^it\._partial_=1: expected true or false"),
    ({"_convert_": "much"}, r"^it\._convert_='much': expected none, partial, object or all"),
    ({"_args_": "x"}, r"^it\._args_='x': expected a list"),
])  # fmt: skip
def test_invalid_targets_are_refused_before_import(content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_buildable(content, "it")
    require_buildable({"_target_": "torch.nn.ReLU", "_partial_": True, "_convert_": "all", "_args_": [1]}, "it")


@pytest.mark.parametrize(("overrides", "message"), [
    (["traning=pgd"], "traning=pgd: unknown key traning; did you mean training=pgd?"),
    (["model.hiden=3"], "model.hiden=3: unknown key model.hiden; did you mean model.hidden?; model has"),
    (["training=pgd", "training.atack.steps=3"], "unknown key training.atack; did you mean training.attack?"),
    (["attack.pgd={step: 3}"], "unknown key attack.pgd.step; did you mean attack.pgd.steps?"),
    (["attak@attack.x=pgd"], "there is no group attak; did you mean attack?"),
    (["activation@model=kwta"], "the package of activation is fixed; expected activation=kwta"),
    (["~model=mlp"], "~model=mlp: a run needs its model; expected model=OPTION"),
    (["experiment=paper/cifar11"], "no option of the group experiment; did you mean paper/cifar10?"),
    (["seed=é"], "seed=é: the value cannot be read; as text it is written 'seed=\"é\"'"),
    (["a b=3"], "'a b' cannot be a key"),
    (["seed=int(x)"], "invalid literal for int()"),
    (["+x=1", "x.y=2"], "x has no keys of its own"),
])  # fmt: skip
def test_wrong_override_message_suggests_the_nearest_name(overrides: list[str], message: str) -> None:
    found = mistake(overrides, None, multirun=False)
    assert found is not None
    assert message in found


@pytest.mark.parametrize("overrides", [
    ["activation=relu", "model=mlp", "model.hidden=[3]", "+attack@attack.more=deepfool", "attack.more.steps=3"],
    ["training=pgd", "attack@training.attack=bpda_inner", "~attack.pgd", "+point=relu"],
    ["++x.y=1", "x.y=2"],
    ["hydra.foo=1", "experiment=paper/cifar10", "dataset=${threat}"],
])  # fmt: skip
def test_valid_overrides_give_no_message(overrides: list[str]) -> None:
    assert mistake(overrides, None, multirun=False) is None


def test_user_options_and_grids_are_checked_too(tmp_path: Path) -> None:
    (tmp_path / "activation").mkdir()
    (tmp_path / "activation" / "squash.yaml").write_text("_target_: a.Squash\n_partial_: true\nslope: 1\n")
    own = ["activation=squash", "activation.slope=2"]
    assert mistake(own, tmp_path, multirun=False) is None
    assert "activation=squash: no option" in (mistake(own, None, multirun=False) or "")
    found = mistake(["activation.slop=2", "activation=squash"], tmp_path, multirun=False)
    assert found is not None
    assert "did you mean activation.slope?" in found
    grid = ["activation=relu,kwtaa", "seed=1,2"]
    assert "activation=kwtaa: no option" in (mistake(grid, None, multirun=True) or "")
    assert mistake(["activation=relu,kwta", "seed=1,2"], None, multirun=True) is None


def test_run_name_holds_the_options_and_the_ratio(composed: Callable[..., DictConfig]) -> None:
    chosen = {"dataset": "digits", "model": "cnn", "training": "natural"}
    named = {
        "kwta": "kwta0.1", "lwta": "lwta2", "lwta_stochastic": "lwta_stochastic2", "relu": "relu",
        "kwta_k": "kwta_k64",
    }  # fmt: skip
    for option, name in named.items():
        cfg = composed(f"activation={option}")
        assert run_name(cfg, {**chosen, "activation": option}, "full") == f"digits-cnn-{name}-natural"


def test_run_folder_depends_on_the_identity(tmp_path: Path) -> None:
    folders = [RunFolder.of(tmp_path, "n", seed, {"a": a, "b": 1}).path for seed, a in ((0, 1), (0, 2), (1, 1))]
    assert len(set(folders)) == 3
    assert RunFolder.of(tmp_path, "n", 0, {"b": 1, "a": 1}).path == folders[0]


def test_network_factory_gets_the_data_facts_in_its_signature() -> None:
    facts = {"num_classes": 2, "in_channels": 3, "image_size": (4, 5)}
    assert with_facts(lambda num_classes: None, facts) == {"num_classes": 2}
    assert with_facts(lambda **anything: None, facts) == facts


def test_trusted_classes_are_those_that_conf_names() -> None:
    found = set()
    for (group, _), node in nodes().items():
        if group in ("dataset", "threat", "activation", "model"):
            found |= set(targets(OmegaConf.to_container(node)))
    assert found == TRUSTED


def test_user_code_is_part_of_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_layers.py").write_text("class A: pass\n")
    node = {"_target_": "kwta_exp.models.MLP", "activation": [{"_target_": "own_layers.A"}]}
    first = local_code(node)
    (tmp_path / "own_layers.py").write_text("class A: x = 1\n")
    assert first.keys() == local_code(node).keys() == {"own_layers"}
    assert first != local_code(node)
    assert local_code({"_target_": "torch.nn.GELU", "b": {"_target_": "numpy.array"}}) == {}
    attack = {"_target_": "kwta_exp.attacks.BPDA", "gates": {"torch.nn.ReLU": "own_layers.A"}}
    assert local_code({"training": {"attack": attack}}).keys() == {"own_layers"}


def test_evaluating_a_run_uses_its_recorded_groups(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    source = composed("activation=lwta", "model=mlp", "threat.eps=0.3")
    (tmp_path / "config.yaml").write_text(
        OmegaConf.to_yaml(OmegaConf.masked_copy(source, ["activation", "model", "threat", "dataset"]))
    )
    (tmp_path / "overrides.yaml").write_text(
        "choices: {activation: lwta, model: mlp, dataset: digits, threat: digits}"
    )
    forge(tmp_path)
    given = ["training=none", "weights=x", "threat.norm=l2"]
    run = RecordedRun.read(tmp_path, "weights")
    assert (run.choices["activation"], run.choices["model"]) == ("lwta", "mlp")

    cfg = adopted(composed(*given), CommandLine({}, given), run, None)
    assert cfg.model.activation._target_ == "kwta_exp.activations.LWTA"
    assert (cfg.threat.eps, cfg.threat.norm) == (0.3, "l2")

    given = ["model=cnn", *given]
    cfg = adopted(composed(*given), CommandLine({}, given), run, None)
    assert "CNN" in cfg.model._target_
