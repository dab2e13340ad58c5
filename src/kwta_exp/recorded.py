"""What a run folder says of the network and data it was made with, and how much of that is believed.

A folder can come from anybody. Unless it is trusted, only this project's own classes are built on its word, no
interpolation in it is resolved, and no path of it is used: data is looked for where the user keeps it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kwta_exp.errors import UserError
from kwta_exp.received import plain_yaml
from kwta_exp.run_folder import read_described, readable
from kwta_exp.trust import require_trusted

GROUPS = ("dataset", "threat", "activation", "model")
"""What a judged run lends to the command that judges it."""

PLACES = ("root", "path", "download", "workers")
"""Where a dataset lies and how it is read; not part of what it is."""

LOCAL_PLACES = ("${paths.data}", "${paths.data}/imagenet")
"""Places that a folder may name, because the user's own ``paths.data`` decides them."""


@dataclass(frozen=True)
class RecordedRun:
    """The part of a run folder's ``config.yaml`` and ``overrides.yaml`` that describes a network and its data.

    Attributes:
        key: where the folder was named, such as ``"weights"``, for messages.
        path: the folder.
        groups: a plain mapping for each of :data:`GROUPS` that is there, interpolations as they were written.
        choices: the option chosen in each group.
    """

    key: str
    path: Path
    groups: dict[str, dict[str, Any]]
    choices: dict[str, str]

    @classmethod
    def read(cls, path: Path, key: str) -> "RecordedRun":
        """Read a run folder; nothing is built or resolved.

        Raises:
            UserError: naming ``key``, if the folder has no such files or they are not what a run writes.
        """
        config, overrides = (_mapping(path / name, key) for name in ("config.yaml", "overrides.yaml"))
        groups = {group: config[group] for group in GROUPS if group in config}
        choices = overrides.get("choices") or {}
        plain = all(isinstance(group, dict) for group in groups.values()) and isinstance(choices, dict)
        if not plain or not _is_plain([groups, choices]):
            raise UserError(f"{key}={path}: its config.yaml is not one that a run of this project writes")
        named = {group: readable(str(choices.get(group, "unnamed"))) for group in GROUPS}
        return cls(key, path, groups, named)

    def group(self, name: str, trust: bool) -> dict[str, Any]:
        """The configuration of one group, as far as it is believed.

        Args:
            name: one of :data:`GROUPS`.
            trust: whether the user vouches for the folder: then it is believed whole.

        Raises:
            UserError: if it names a class, an interpolation or a place that is not believed.
        """
        if name not in self.groups:
            raise UserError(f"{self.key}={self.path}: its config.yaml has no {name}; expected a run's folder")
        content = self.groups[name]
        if trust:
            return content
        if name == "dataset":
            content = self._without_places(content)
        require_trusted(content, name, f"{self.key}={self.path}", allowed=("${activation}", *LOCAL_PLACES))
        return content

    def _without_places(self, dataset: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in dataset.items() if name not in PLACES}
        for name in ("root", "path"):
            place = dataset.get(name)
            if place in LOCAL_PLACES:
                kept[name] = place
            elif place is not None:
                option = self.choices["dataset"]
                raise UserError(
                    f"{self.key}={self.path}: its data lay at dataset.{name}={place}; a path is not taken from"
                    f" a run folder. Expected dataset={option} dataset.{name}={place}, or trust=true for a"
                    " folder of your own"
                )
        return kept


def _mapping(path: Path, key: str) -> dict[str, Any]:
    try:
        content = plain_yaml(read_described(path.parent, path.name))
    except ValueError as error:
        raise UserError(f"{key}={path.parent}: no readable {path.name} there ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{key}={path.parent}: its {path.name} is no mapping")
    return content


def _is_plain(content: Any) -> bool:
    """Whether it is made of what a configuration can hold: YAML has dates, sets and keys of any kind, too."""
    if isinstance(content, dict):
        return all(isinstance(key, str) and _is_plain(value) for key, value in content.items())
    if isinstance(content, list):
        return all(map(_is_plain, content))
    if isinstance(content, int):
        return abs(content) < 2**63
    return content is None or isinstance(content, str | float)
