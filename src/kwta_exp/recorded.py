"""The network and data that a run folder records, and which parts of the record are trusted.

People exchange run folders, so a folder is untrusted input. Unless the user trusts it, only classes of this
project are built from it, no interpolation in it is resolved, and no path in it is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kwta_exp.errors import UserError
from kwta_exp.received import plain_yaml
from kwta_exp.run_folder import read_config_file, readable
from kwta_exp.trust import TRUST_IT, require_trusted

GROUPS = ("dataset", "threat", "activation", "model")
"""What ``training=none weights=RUN_FOLDER`` takes from the run, unless the command line chooses it."""

PLACES = ("root", "path", "download", "workers")
"""Where a dataset lies and how it is read; not part of what it is."""

LOCAL_PLACES = ("${paths.data}", "${paths.data}/imagenet")
"""Places that a folder may name, because the user's own ``paths.data`` decides them."""


@dataclass(frozen=True)
class RecordedRun:
    """The part of a run folder's ``config.yaml`` and ``overrides.yaml`` that describes a network and its data.

    Attributes:
        key: the configuration key that names the folder, such as ``"weights"``, for messages.
        path: the folder.
        groups: a plain mapping for each of :data:`GROUPS` that is recorded, with interpolations unresolved.
        choices: the option chosen in each of them.
    """

    key: str
    path: Path
    groups: dict[str, dict[str, Any]]
    choices: dict[str, str]

    @classmethod
    def read(cls, path: Path, key: str) -> "RecordedRun":
        """Read a run folder; nothing is built or resolved.

        Raises:
            UserError: naming ``key``, if these files are missing or are not what a run writes.
        """
        config, overrides = (_mapping(path / name, key) for name in ("config.yaml", "overrides.yaml"))
        groups = {group: config[group] for group in GROUPS if group in config}
        choices = overrides.get("choices")
        mappings = all(isinstance(group, dict) for group in groups.values())
        if not isinstance(choices, dict) or not mappings or not _is_plain([groups, choices]):
            raise UserError(f"{key}={path}: its config.yaml is not one that a run of this project writes")
        chosen = {group: readable(str(choices[group])) for group in groups if group in choices}
        return cls(key, path, groups, chosen)

    def group(self, name: str, trust: bool) -> dict[str, Any]:
        """The recorded configuration of one group.

        Args:
            name: one of :data:`GROUPS`.
            trust: return it as recorded, whatever it names.

        Raises:
            UserError: if it is not trusted and names a class, an interpolation or a path that is not allowed.
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
                option = self.choices.get("dataset", "OPTION")
                raise UserError(
                    f"{self.key}={self.path}: its data is at dataset.{name}={place}, and a run folder may not"
                    f" choose a path; expected dataset={option} dataset.{name}={place} on the command line, or"
                    f" {TRUST_IT}"
                )
        return kept


def _mapping(path: Path, key: str) -> dict[str, Any]:
    try:
        content = plain_yaml(read_config_file(path.parent, path.name))
    except ValueError as error:
        raise UserError(f"{key}={path.parent}: cannot read its {path.name} ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{key}={path.parent}: its {path.name} is not a mapping")
    return content


def _is_plain(content: Any) -> bool:
    """Whether a configuration can hold ``content``; YAML also has dates, sets and keys of any type."""
    if isinstance(content, dict):
        return all(isinstance(key, str) and _is_plain(value) for key, value in content.items())
    if isinstance(content, list):
        return all(map(_is_plain, content))
    if isinstance(content, int):
        return abs(content) < 2**63
    return content is None or isinstance(content, str | float)
