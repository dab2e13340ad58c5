"""Random command lines: each reaches the run or gives one message, and neither writes a file."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from kwta_exp import experiment
from kwta_exp.data.torchvision import _Torchvision
from kwta_exp.errors import UserError
from kwta_exp.suggest import Tree
from tests.conftest import ROOT
from tests.launched import message_of, time_limit

CONF = ROOT / "conf"

VALUES = [
    "", "null", "true", "-1", "0", "3", "0.5", "-0.0", "1e30", "1e-300", "nan", "inf", "-inf", str(10**30),
    "1.5", "abc", "8/255", "8/0", "1//2", "[]", "[1,2]", "[a,[b]]", "[null]", "{}", "{a:1}",
    "{_target_: os.remove}",
    "'quo\"ted'", '"', "'", "[", "{", "a b", "a=b", "a,b", "1,2", "range(3)", "int(x)", "${oc.env:HOME}",
    "${nothing}", "${seed}", "${oc.env:NO_SUCH_VARIABLE}", "${", "${a:b:c}", "é", "'é'", "'漢字'", "'\\n'",
    "'\x1b[31m'",
    "'" + "x" * 5000 + "'", "[" + ",".join(["1"] * 2000) + "]", "../..", "/", "-", "~", "*", "???", "'???'",
]  # fmt: skip

TARGETS = [
    "os.remove", "os.system", "os._exit", "sys.exit", "builtins.print", "shutil.rmtree", "subprocess.run",
    "torch", "torch.nn.Linear", "torch.nn.ReLU", "torch.load", "numpy.zeros", "kwta_exp.attacks.PGD",
    "torch.hub.load",
    "kwta_exp.models.MLP", "kwta_exp.storage.write_text", "kwta_exp.nothing", "no.such.thing", "",
    "..", "a b", "3",
    "null", "[os.remove]",
]  # fmt: skip

RESERVED = {
    "_target_": TARGETS,
    "_partial_": ["true", "false", "3", "null", "abc"],
    "_convert_": ["all", "none", "abc", "3"],
    "_recursive_": ["true", "false", "abc"],
    "_args_": ["[]", "[1]", "3", "{}"],
}


def keys_of(node: Any, parent: str = "") -> Iterator[str]:
    """Every dotted key of a configuration except Hydra's own."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    for name in map(str, node):
        if parent or name != "hydra":
            key = f"{parent}.{name}" if parent else name
            yield key
            yield from keys_of(node._get_node(name), key)


class CommandLines:
    """Seeded random overrides made of the existing groups, options and keys."""

    def __init__(self, composed: Callable[..., DictConfig]) -> None:
        self.groups = Tree.of([CONF]).groups
        self.composed = composed
        self._keys: dict[str, list[str]] = {}

    def keys(self, choice: str) -> list[str]:
        if choice not in self._keys:
            self._keys[choice] = sorted(keys_of(self.composed(choice) if choice else self.composed()))
        return self._keys[choice]

    def __getitem__(self, number: int) -> list[str]:
        rng = random.Random(number)
        group = rng.choice(sorted(set(self.groups) - {"point", "experiment", "attack"}))
        option = rng.choice(self.groups[group])
        choice = rng.choice(["", f"{group}={option}"])
        keys = self.keys(choice if group != "dataset" or not choice else "")
        return [*([choice] if choice else []), *(self._wrong(rng, keys) for _ in range(rng.choice([1, 1, 2])))]

    def _wrong(self, rng: random.Random, keys: list[str]) -> str:
        key, value = rng.choice(keys), rng.choice(VALUES)
        group = rng.choice(sorted(self.groups))
        option = rng.choice(self.groups[group])
        reserved = rng.choice(sorted(RESERVED))
        parents = sorted({key.rpartition(".")[0] for key in keys if "." in key})
        position = rng.randrange(len(key))
        return rng.choice([
            *[f"{key}={value}"] * 12,
            f"{group}={value}",
            f"{group}={option[1:]}",
            f"+{group}={option}",
            f"+attack@attack.more={rng.choice(self.groups['attack'])}",
            f"{group}@{rng.choice(parents)}={option}",
            f"~{key}",
            f"~{group}",
            f"+{key}={value}",
            f"++{key}={value}",
            f"+{rng.choice(parents)}.more={value}",
            f"+x.y={value}",
            f"{key[:position]}{key[position + 1:]}={value}",
            *[f"++{rng.choice(parents)}.{reserved}={rng.choice(RESERVED[reserved])}"] * 3,
            value.lstrip("-"),  # a leading one makes it an option, which argparse refuses
        ])  # fmt: skip


class ReachedError(Exception):
    """Raised in place of making the run's folder."""


def outcome(overrides: list[str]) -> str | None:
    """The error message of ``python run.py OVERRIDES``; ``None`` if the run would start."""
    try:
        message = message_of(overrides)
    except ReachedError:
        return None
    assert message, f"{overrides}: ran"
    return message


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*anything: object) -> None:
        raise ReachedError

    def refuse(self: object) -> None:
        raise UserError("dataset: nothing is downloaded here")

    monkeypatch.setattr(experiment, "opened", stop)
    monkeypatch.setattr(_Torchvision, "_fetch", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


def check(numbers: range, tmp_path: Path) -> None:
    messages = 0
    with initialize_config_dir(str(CONF), version_base="1.3"):
        lines = CommandLines(lambda *overrides: compose("config", list(overrides)))
        for number in numbers:
            overrides = lines[number]
            with time_limit(120, f"{number}: {overrides}"):
                message = outcome([*overrides, "runtime.threads=1"])
            if message is not None:
                messages += 1
                assert message.strip(), overrides
                assert "Traceback" not in message
                assert max(map(len, message.splitlines())) <= 750, overrides
            assert list(tmp_path.iterdir()) == [], overrides
    assert messages > len(numbers) / 3  # enough of them are wrong for a useful test


@pytest.mark.usefixtures("no_run")
def test_forty_random_command_lines_give_one_message_or_reach_the_run(tmp_path: Path) -> None:
    check(range(40), tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("no_run")
def test_three_hundred_random_command_lines_give_one_message_or_reach_the_run(tmp_path: Path) -> None:
    check(range(1000, 1300), tmp_path)
