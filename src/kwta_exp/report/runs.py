"""Finds run folders and reads what was run, how far it is, and what came out."""

import fnmatch
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from kwta_exp.attempts import State, state_of
from kwta_exp.errors import UserError
from kwta_exp.received import plain_yaml
from kwta_exp.results_file import read_results
from kwta_exp.run_folder import read_config_file
from kwta_exp.storage import read_json

DEEPEST = 4
"""How far below the given folder runs are looked for: ``outputs/<name>/s<seed>-<hash>`` is two levels down."""

_UNINTERESTING = (
    "_target_",
    "_partial_",
    "paths.",
    "sweep",
    "rerun",
    "retries",
    "fail_fast",
    "jobs_per_gpu",
    "trust",
    "tracking",
    "evaluation.processes",
)
"""Beginnings, or last parts, of keys that do not tell runs apart."""


@dataclass(frozen=True)
class Run:
    """A run folder, as it was read.

    Attributes:
        folder: the folder.
        settings: what was run: the option chosen in each group, such as ``{"activation": "kwta"}``, and every
            value, such as ``{"activation.ratio": 0.1}``. Empty if it could not be read.
        state: how far it is.
        cause: why it failed or could not be read, one line; else empty.
        seconds: what the finished attempt took, with all before it; ``None`` if it is not finished.
        evaluations: the results of its finished evaluations, by folder name.
        latest: the results of the latest one.
        started: when its last attempt started, in seconds since 1970; 0 if that is unknown.
    """

    folder: Path
    settings: dict[str, Any]
    state: State
    cause: str = ""
    seconds: float | None = None
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    latest: dict[str, Any] | None = None
    started: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a run folder; whatever is wrong with it is its ``cause``, and never an exception."""
        try:
            settings = _settings(folder)
        except (UserError, ValueError) as error:
            return cls(folder, {}, "damaged", str(error).splitlines()[0])
        evaluations, damage = {}, ""
        for path in sorted(folder.glob("evaluation/*/results.json")):
            try:
                results = read_results(path)
            except UserError as error:
                damage = str(error)
            else:
                if results is not None:
                    evaluations[path.parent.name] = results
        latest = evaluations.get(_latest_name(folder))
        progress = state_of(folder, finished=latest is not None)
        started = float(progress.attempts[-1].get("started", 0.0)) if progress.attempts else 0.0
        return cls(
            folder, settings, progress.state, progress.cause or damage, progress.seconds, evaluations, latest,
            started,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """``<name>/s<seed>-<hash>``."""
        return f"{self.folder.parent.name}/{self.folder.name}"


def _latest_name(folder: Path) -> str:
    """The folder name of the latest evaluation; the run's own ``results.json`` is a copy of its results."""
    try:
        return str(read_json(folder / "results.json")["evaluation"]["name"])
    except (UserError, LookupError, TypeError):
        return ""


def is_run(folder: Path) -> bool:
    """Whether this is a run's folder."""
    return (folder / "environment.json").is_file()


def find(roots: Iterable[Path]) -> list[Path]:
    """The run folders that ``roots`` are or contain, in order of their names; links are not followed.

    Folders that were set aside (``...-before-<time>``) are left out.

    Raises:
        UserError: if one of ``roots`` does not exist.
    """
    found: dict[Path, None] = {}
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; expected a folder with runs, such as outputs")
        found |= dict.fromkeys(_below(root.absolute(), DEEPEST))
    return list(found)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    if any(entry.name == "environment.json" for entry in entries):
        yield folder
        return
    for entry in entries:
        hidden = entry.name.startswith(".") or "-before-" in entry.name
        if depth and not hidden and entry.is_dir(follow_symlinks=False):
            yield from _below(Path(entry.path), depth - 1)


def selected(runs: Iterable[Run], pattern: str | None, wanted: Sequence[str]) -> list[Run]:
    """The runs whose name matches ``pattern`` and that have the ``wanted`` values.

    Args:
        runs: to choose from.
        pattern: with ``*`` and ``?``, or a part of the name; ``None`` for all.
        wanted: ``key=value``, or ``key=value,value`` for any of several.

    Raises:
        UserError: for a text that is not ``key=value``, or a key that no run has.
    """
    runs = list(runs)
    if pattern is not None:
        glob = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
        runs = [run for run in runs if fnmatch.fnmatchcase(run.name, glob)]
    for text in wanted:
        key, equals, values = text.partition("=")
        if not equals:
            raise UserError(f"{text}: expected KEY=VALUE, such as activation.ratio=0.1 or training=pgd")
        known = {known for run in runs for known in run.settings}
        if runs and key not in known:
            from kwta_exp.explain import did_you_mean  # only for an error

            raise UserError(f"{key}: no run has this key{did_you_mean(key, sorted(known))}")
        allowed = values.split(",")
        runs = [run for run in runs if shown(run.settings.get(key)) in allowed]
    return runs


def varying(runs: Sequence[Run]) -> list[str]:
    """The keys whose values differ between ``runs``: groups first, ``seed`` last.

    A key that only some of the runs have differs too, unless its group differs: runs of other activations have
    other values.
    """
    readable = [run for run in runs if run.settings]
    keys = dict.fromkeys(key for run in readable for key in run.settings if tells_runs_apart(key))
    differing = [key for key in keys if len({shown(run.settings.get(key)) for run in readable}) > 1]
    kept = [key for key in differing if not _follows_from_another(key, differing, readable)]
    return sorted(kept, key=lambda key: (key == "seed", "." in key))


def _follows_from_another(key: str, differing: Sequence[str], runs: Sequence[Run]) -> bool:
    """Whether a shorter key tells the same: the values of a group that are the same wherever it is chosen."""
    group = key.rpartition("@")[2].partition(".")[0]  # that of attack@training.attack is training
    if group == key or group not in differing:
        return False
    values: dict[str, set[str]] = {}
    for run in runs:
        values.setdefault(shown(run.settings.get(group)), set()).add(shown(run.settings.get(key)))
    return all(len(of_group) == 1 for of_group in values.values())


def tells_runs_apart(key: str) -> bool:
    """Whether runs with other values at ``key`` are other runs."""
    return key.rpartition(".")[2] not in _UNINTERESTING and not key.startswith(_UNINTERESTING)


def shown(value: Any) -> str:
    """A value as an override writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _settings(folder: Path) -> dict[str, Any]:
    """The options and values that a run folder records."""
    recorded = _parsed_block(read_config_file(folder, "overrides.yaml"))
    choices = recorded.get("choices") if isinstance(recorded, Mapping) else None
    if not isinstance(choices, Mapping):
        raise ValueError(f"{folder}: its overrides.yaml has no choices")
    found = {str(group): option for group, option in choices.items() if isinstance(option, str | None)}
    for block in _blocks(read_config_file(folder, "config.yaml")):
        found |= dict(_leaves(_parsed_block(block)))
    return found


def _blocks(text: str) -> Iterator[str]:
    """The text of each top-level key. Runs of a grid share most blocks, which are then parsed once."""
    block: list[str] = []
    for line in text.splitlines(keepends=True):
        if block and line[:1] not in (" ", "-", "\n", "#"):
            yield "".join(block)
            block = []
        block.append(line)
    if block:
        yield "".join(block)


@lru_cache(maxsize=4096)
def _parsed_block(text: str) -> Any:
    return plain_yaml(text)


def _leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, content
