"""What is wrong with a command line that Hydra cannot compose, and what was probably meant."""

import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf

from kwta_exp.errors import UserError
from kwta_exp.explain import did_you_mean


def better_message(error: Exception, arguments: Sequence[str], conf: Path) -> str | None:
    """One message for an error that composing or running ``arguments`` ended in.

    Args:
        error: what was raised.
        arguments: the command line, without the program's name.
        conf: the folder of ``config.yaml`` and its groups.

    Returns:
        ``None`` where the error is no mistake of the command line, or has its message already.
    """
    if isinstance(error, UserError) or isinstance(error.__cause__, UserError) or _in_a_job(error):
        return None
    given, _ = get_args_parser().parse_known_args(list(arguments))
    own = [Path(given.config_dir).absolute()] if given.config_dir else []
    if found := complaint(given.overrides, conf, own, given.multirun):
        return found
    said = "\n".join(line for part in (error, error.__cause__) for line in _own_lines(part))
    return said or type(error).__name__


def _in_a_job(error: Exception) -> bool:
    """Whether Hydra had composed the configuration and called us when ``error`` came up."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_name == "run_job" for frame, _ in frames)


def _own_lines(error: BaseException | None) -> list[str]:
    """The lines of Hydra's message that tell a user something."""
    said = str(error).split("Config search path:")[0] if error is not None else ""
    dropped = ("See https://hydra.cc", "full_key:", "object_type=")
    return [line for line in said.splitlines() if line.strip() and not line.strip().startswith(dropped)]


def complaint(overrides: Sequence[str], conf: Path, own: Sequence[Path], multirun: bool) -> str | None:
    """What is wrong with the first of ``overrides`` that cannot be meant so, and the nearest name.

    Args:
        overrides: as on a command line.
        conf: the folder of ``config.yaml`` and its groups.
        own: further folders with options, of ``--config-dir``.
        multirun: whether an override may have several values.

    Returns:
        ``None`` if nothing is wrong with any of them by itself.
    """
    parsed = []
    for text in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(text))
        except Exception as error:  # a grammar's, or whatever a cast that fails raises
            return _unreadable(text, error)
    tree = Tree.of([conf, *own])
    for override in parsed:
        if not override.get_key_element().startswith("hydra") and (
            found := _wrong_choice(override, tree, multirun)
        ):
            return found
    grouped = [override for override in parsed if override.key_or_group in tree.groups]
    cfg = _composed(grouped, conf, own)
    for override in parsed:
        if override not in grouped and not override.get_key_element().startswith("hydra"):
            if found := _wrong_key(override, cfg, tree):
                return found
            if override.is_add() or override.is_force_add():
                OmegaConf.update(cfg, override.key_or_group, _value(override), force_add=True)
    return None


_KEY = re.compile(r"[+~]*[\w-]+([./@:][\w-]+)*")


@dataclass(frozen=True)
class Tree:
    """The groups and options below the configuration's folders."""

    groups: Mapping[str, Sequence[str]]
    chosen: Sequence[str]
    """The groups that ``config.yaml`` chooses an option of."""

    @classmethod
    def of(cls, folders: Sequence[Path]) -> "Tree":
        files = [
            path.relative_to(folder).with_suffix("")
            for folder in folders
            for path in sorted(folder.rglob("*.yaml"))
            if path.parent != folder
        ]
        tops = {file.parents[-2].as_posix() for file in files} - {"hydra"}
        groups = {
            top: sorted({file.relative_to(top).as_posix() for file in files if file.parents[-2].name == top})
            for top in tops
        }
        defaults = yaml.safe_load((folders[0] / "config.yaml").read_text())["defaults"]
        chosen = [key for entry in defaults if isinstance(entry, dict) for key in entry if " " not in key]
        return cls(groups, chosen)


def _unreadable(text: str, error: Exception) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        return f"{text}: not an override; expected KEY=VALUE"
    if not _KEY.fullmatch(key):
        return f"{text}: {key!r} cannot be a key; expected names separated by dots, or GROUP=OPTION"
    if "evaluating" in str(error):
        return f"{text}: cannot be read ({_own_lines(error)[-1]})"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f"{text}: the value cannot be read; as text it is written '{key}=\"{quoted}\"'"


def _value(override: Override) -> Any:
    value = override.value()
    return (
        str(value) if value is not None and not isinstance(value, bool | int | float | dict | list) else value
    )


def _values(override: Override) -> list[Any]:
    """Every value that an override would have, in a grid too."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [_value(override)]


DISPENSABLE = ("experiment", "suite", "evaluation")
"""Chosen groups that may be taken out, as far as Hydra is concerned."""


def _wrong_choice(override: Override, tree: Tree, multirun: bool) -> str | None:
    """What is wrong with an override as far as groups and options tell."""
    group, text = override.key_or_group, str(override.input_line)
    if override.is_sweep_override() and not multirun:
        return f"{text}: several values; expected one, or -m first for a grid, or KEY=[A,B] for a list"
    if group not in tree.groups:
        if override.package is not None:
            return f"{text}: there is no group {group}{did_you_mean(group, tree.groups)}"
        return None
    if override.is_delete():
        needed = group in tree.chosen and group not in DISPENSABLE
        return f"{text}: a run needs its {group}; expected {group}=OPTION" if needed else None
    options = tree.groups[group]
    for value in _values(override):
        if isinstance(value, str) and "${" in value:
            continue
        shown = f"{group}={value}" if override.is_sweep_override() else text
        if group == "attack" and override.package is None:
            named = value if value in options else "NAME"
            return f"{shown}: attacks have names; expected +attack@attack.{named}={named}"
        if not isinstance(value, str) or value not in options:
            near = did_you_mean(value, options) if isinstance(value, str) else ""
            return f"{shown}: no option of the group {group}{near}; expected one of {', '.join(options)}"
        if group == "attack" or override.is_add():
            continue
        if group not in tree.chosen:
            return f"{shown}: nothing of the group {group} is chosen so far; expected +{group}={value}"
        if override.package is not None:
            return f"{shown}: {group} stands in one place alone; expected {group}={value}"
    return None


def _wrong_key(override: Override, cfg: DictConfig, tree: Tree) -> str | None:
    """What is wrong with an override of a key, given everything else."""
    key, text = override.key_or_group, str(override.input_line)
    if override.is_force_add():
        return None
    node: Any = cfg
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, ListConfig):
            return None
        if not isinstance(node, DictConfig) or node._is_none() or part not in node:
            if override.is_add():
                return None
            return _unknown(override, parts[:depth], part, node, tree)
        node = node._get_node(part)
    value = None if override.is_delete() else _value(override)
    if isinstance(value, dict) and isinstance(node, DictConfig) and not override.is_add():
        for name in value:
            if name not in node:
                return _unknown(override, parts, str(name), node, tree)
    if override.is_add() and not isinstance(value, dict | list):
        return f"{text}: {key} is there already; expected {text.removeprefix('+')}"
    return None


def _unknown(override: Override, path: Sequence[str], part: str, node: Any, tree: Tree) -> str:
    at, text = ".".join([*path, part]), str(override.input_line)
    value = None if override.is_delete() else _value(override)
    if not path:
        names = [*tree.groups, *(str(name) for name in node if name != "hydra")]
        return f"{text}: unknown key {part}{did_you_mean(part, names, value)}"
    where = ".".join(path)
    if not isinstance(node, DictConfig) or node._is_none():
        return f"{text}: {where} has no keys of its own"
    names = [str(name) for name in node]
    near = did_you_mean(part, names, prefix=f"{where}.")
    listed = [name for name in names if not name.startswith("_")]
    return f"{text}: unknown key {at}{near}; {where} has {', '.join(listed) or 'no keys'}"


def _composed(grouped: Sequence[Override], conf: Path, own: Sequence[Path]) -> DictConfig:
    """The configuration under as many of the chosen options as go together."""
    search = f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in own)}]"
    texts = [str(override.input_line) for override in grouped if not override.is_sweep_override()]
    with _hydra(conf):
        for attempt in ([search, *texts], [search], []):
            try:
                return compose("config", attempt)
            except Exception as error:  # the override at fault is not among those looked at here
                last = error
    raise last


@contextmanager
def _hydra(conf: Path) -> Iterator[None]:
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with initialize_config_dir(str(conf.absolute()), version_base="1.3"):
            yield
