"""Better messages for a command line that Hydra cannot compose: what is wrong, and the nearest name."""

import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf

from kwta_exp.config import composed
from kwta_exp.environment import CONF
from kwta_exp.errors import UserError
from kwta_exp.explain import did_you_mean
from kwta_exp.failures import first_line

OPTIONAL = ("experiment", "suite", "evaluation", "threat")
"""Groups of ``config.yaml`` that Hydra can compose without."""

_LAUNCHERS = ("submitit", "joblib", "ray")
"""Their own errors say that the process of a job died."""

_KEY = re.compile(r"[+~]*[\w-]+([./@:][\w-]+)*")


def better_message(error: Exception, arguments: Sequence[str]) -> str | None:
    """One message for an error that composing or running ``arguments`` ended in.

    Args:
        error: what was raised.
        arguments: the command line, without the program's name.

    Returns:
        ``None`` where the error is no mistake of the command line, or has its message already.
    """
    if type(error).__module__.partition(".")[0] in _LAUNCHERS:
        return (
            f"a job of the grid was lost: {first_line(error)}\nkwta-exp status shows how far the others are;"
            " the same command continues"
        )
    if isinstance(error, UserError) or isinstance(error.__cause__, UserError) or _in_a_job(error):
        return None
    given, _ = get_args_parser().parse_known_args(list(arguments))
    own = Path(given.config_dir).absolute() if given.config_dir else None
    if found := mistake(given.overrides, own, given.multirun):
        return found
    said = "\n".join(line for part in (error, error.__cause__) for line in _useful_lines(part))
    return said or type(error).__name__


def _in_a_job(error: Exception) -> bool:
    """Whether Hydra had composed the configuration and called our job when ``error`` was raised."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_name == "run_job" for frame, _ in frames)


def _useful_lines(error: BaseException | None) -> list[str]:
    """The lines of Hydra's message that help a user."""
    said = str(error).split("Config search path:")[0] if error is not None else ""
    dropped = ("See https://hydra.cc", "full_key:", "object_type=")
    return [line for line in said.splitlines() if line.strip() and not line.strip().startswith(dropped)]


def mistake(overrides: Sequence[str], config_dir: Path | None, multirun: bool) -> str | None:
    """What is wrong with the first of ``overrides`` that cannot be right, and the nearest name.

    Args:
        overrides: as on a command line.
        config_dir: a folder of the user's own options, of ``--config-dir``.
        multirun: whether an override may have several values.

    Returns:
        ``None`` if each of them is right by itself.
    """
    parsed = []
    for text in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except Exception as error:  # of the grammar, or of a cast such as int(x)
            return _unreadable(text, error)
    parsed = [override for override in parsed if not override.get_key_element().startswith("hydra")]
    tree = Tree.of([CONF, *([config_dir] if config_dir else [])])
    for override in parsed:
        if found := _wrong_choice(override, tree, multirun):
            return found
    choices = [override for override in parsed if override.key_or_group in tree.groups]
    cfg = _composed(choices, config_dir)
    for override in parsed:
        if override in choices:
            continue
        if found := _wrong_key(override, cfg, tree):
            return found
        if override.is_add() or override.is_force_add():
            OmegaConf.update(cfg, override.key_or_group, _value(override), force_add=True)
    return None


@dataclass(frozen=True)
class Tree:
    """The groups and options in the configuration's folders."""

    groups: Mapping[str, Sequence[str]]
    chosen: Sequence[str]
    """The groups in the defaults list of ``config.yaml``."""

    @classmethod
    def of(cls, folders: Sequence[Path]) -> "Tree":
        """Read the tree; the first folder has ``config.yaml``, others hold a user's own options."""
        groups: dict[str, set[str]] = {}
        for folder in folders:
            for path in folder.glob("*/**/*.yaml"):
                group, *option = path.relative_to(folder).with_suffix("").parts
                groups.setdefault(group, set()).add("/".join(option))
        del groups["hydra"]
        defaults = yaml.safe_load((folders[0] / "config.yaml").read_text())["defaults"]
        chosen = [key for entry in defaults if isinstance(entry, dict) for key in entry if " " not in key]
        return cls({group: sorted(options) for group, options in groups.items()}, chosen)


def _unreadable(text: str, error: Exception) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        return f"{text}: not an override; expected KEY=VALUE"
    if not _KEY.fullmatch(key):
        return f"{text}: {key!r} cannot be a key; expected names separated by dots, or GROUP=OPTION"
    if "evaluating" in str(error):
        return f"{text}: cannot be read ({_useful_lines(error)[-1]})"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f"{text}: the value cannot be read; as text it is written '{key}=\"{quoted}\"'"


def _value(override: Override) -> Any:
    """The value of an override as a configuration would hold it."""
    value = None if override.is_delete() else override.value()
    return value if value is None or isinstance(value, bool | int | float | dict | list) else str(value)


def _wrong_choice(override: Override, tree: Tree, multirun: bool) -> str | None:
    """What is wrong with an override as a choice of an option."""
    group, text, swept = override.key_or_group, str(override.input_line), override.is_sweep_override()
    if swept and not multirun:
        return f"{text}: several values; expected one, or -m first for a grid, or KEY=[A,B] for a list"
    if group not in tree.groups:
        if override.package is not None:
            return f"{text}: there is no group {group}{did_you_mean(group, tree.groups)}"
        return None
    if override.is_delete():
        needed = group in tree.chosen and group not in OPTIONAL
        return f"{text}: a run needs its {group}; expected {group}=OPTION" if needed else None
    options = tree.groups[group]
    for value in override.sweep_string_iterator() if swept else [_value(override)]:
        if isinstance(value, str) and "${" in value:
            continue
        shown = f"{group}={value}" if swept else text
        if group == "attack" and override.package is None:
            named = value if value in options else "NAME"
            return f"{shown}: attacks have names; expected +attack@attack.{named}={named}"
        if not isinstance(value, str) or value not in options:
            near = did_you_mean(value, options) if isinstance(value, str) else ""
            return f"{shown}: no option of the group {group}{near}; expected one of {', '.join(options)}"
        if group == "attack":
            continue
        if override.is_add() and group in tree.chosen:
            return f"{shown}: {group} is chosen by default; expected {group}={value}"
        if group not in tree.chosen and not override.is_add():
            return f"{shown}: {group} is not chosen by default; expected +{group}={value}"
        if override.package is not None and not override.is_add():
            return f"{shown}: the package of {group} is fixed; expected {group}={value}"
    return None


def _wrong_key(override: Override, cfg: DictConfig, tree: Tree) -> str | None:
    """What is wrong with an override of a key, given all choices."""
    if override.is_force_add():
        return None
    key, text, value = override.key_or_group, str(override.input_line), _value(override)
    node: Any = cfg
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, ListConfig):
            return None
        if not isinstance(node, DictConfig) or node._is_none() or part not in node:
            return None if override.is_add() else _unknown(override, parts[:depth], part, node, tree)
        node = node._get_node(part)
    if override.is_add():
        exists = not isinstance(value, dict | list)
        return f"{text}: {key} exists already; expected {text.removeprefix('+')}" if exists else None
    if isinstance(value, dict) and isinstance(node, DictConfig):
        for name in value:
            if name not in node:
                return _unknown(override, parts, str(name), node, tree)
    return None


def _unknown(override: Override, path: Sequence[str], part: str, node: Any, tree: Tree) -> str:
    """The message for a key ``part`` that is not in ``node``, the node at ``path``."""
    at, where, text = ".".join([*path, part]), ".".join(path), str(override.input_line)
    if not path:
        names = [*tree.groups, *map(str, node)]
        return f"{text}: unknown key {part}{did_you_mean(part, names, _value(override))}"
    if not isinstance(node, DictConfig) or node._is_none():
        return f"{text}: {where} has no keys of its own"
    names = [str(name) for name in node]
    near = did_you_mean(part, names, prefix=f"{where}.")
    listed = [name for name in names if not name.startswith("_")]
    return f"{text}: unknown key {at}{near}; {where} has {', '.join(listed) or 'no keys'}"


def _composed(choices: Sequence[Override], config_dir: Path | None) -> DictConfig:
    """The configuration with ``choices``, or without them where they do not compose together."""
    texts = [str(override.input_line) for override in choices if not override.is_sweep_override()]
    try:
        return composed(texts, config_dir)[0]
    except Exception:
        return composed([], config_dir)[0]
