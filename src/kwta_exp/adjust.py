"""The changes that a composed configuration goes through before a run is built from it.

Each function returns a changed copy.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from pydantic import BaseModel, NonNegativeInt

from kwta_exp.config import CommandLine, Config, plain, validated
from kwta_exp.fields import STRICT, fraction
from kwta_exp.recorded import RecordedRun

log = logging.getLogger(__name__)

SCALED = ("dataset", "evaluation", "recipe", "model", "training", "attack")
"""The nodes that a scale changes."""


class Scale(BaseModel):
    """``conf/scale/*.yaml``: the largest number for each name, and replacements for some targets."""

    model_config = STRICT
    name: str
    caps: dict[str, NonNegativeInt]
    instead: dict[str, dict[str, Any]]


def adopted(cfg: Config, line: CommandLine, run: RecordedRun | None, ratio: float | None) -> Config:
    """``cfg`` with what trained weights decide when they are only evaluated.

    Args:
        cfg: as composed; its ``trust`` says whether ``run`` is trusted.
        line: the command line. A group chosen there stays, and so does a single value (``threat.eps=0.05``).
        run: the run that trained them: its dataset, threat, activation and model replace those of ``cfg``.
        ratio: the sparsity ratio that the weights were trained to.

    Raises:
        UserError: if the run folder names a class or a path that is not trusted.
    """
    values: dict[str, Any] = {}
    if run is not None:
        values = {group: run.group(group, cfg.trust) for group in run.groups if group not in line.keys}
        single = [key for key in line.keys if "." in key and key.split(".")[0] in values]
        values |= {key: OmegaConf.select(cfg, key) for key in single}
    cfg = updated(cfg, values)
    if ratio and "activation.ratio" not in line.keys and OmegaConf.select(cfg, "activation.ratio") is not None:
        cfg = updated(cfg, {"activation.ratio": ratio})
    return cfg


def updated(cfg: Config, values: Mapping[str, Any]) -> Config:
    """A copy of ``cfg`` with the value at each dotted key replaced."""
    cfg = copy.deepcopy(cfg)
    for key, value in values.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def scaled(cfg: Config, nodes: Sequence[str] = SCALED) -> Config:
    """``cfg`` with every number that ``scale.caps`` names reduced to its cap; logs what changed.

    A cap applies to its name at any depth of ``nodes``, and to each number of a list. null counts as more than
    the cap. An attack whose target ``scale.instead`` names is replaced.

    Raises:
        UserError: naming the key and value of ``scale`` at fault.
    """
    scale = validated(Scale, plain(cfg, "scale"), "scale")
    if not scale.caps and not scale.instead:
        return cfg
    cfg, changes = copy.deepcopy(cfg), list[str]()
    for name, attack in plain(cfg, "attack").items():
        if isinstance(attack, dict) and (other := scale.instead.get(str(attack.get("_target_")))):
            OmegaConf.update(cfg, f"attack.{name}", {**attack, **other}, force_add=True)
            changes.append(f"attack.{name} is {str(other.get('_target_', 'changed')).rpartition('.')[2]}")
    for node in nodes:
        changes += _cap(OmegaConf.select(cfg, node), node, scale.caps)
    if changes:
        log.info("scale=%s: %s", scale.name, ", ".join(changes))
    return cfg


def _cap(node: Any, key: str, caps: Mapping[str, int]) -> Iterator[str]:
    """Reduce the numbers in the node at ``key``, and describe each change."""
    for name in node if OmegaConf.is_dict(node) else ():
        if OmegaConf.is_missing(node, name):
            continue
        value = node[name]
        if OmegaConf.is_dict(value):
            yield from _cap(value, f"{key}.{name}", caps)
        elif name in caps:
            old = OmegaConf.to_container(value) if OmegaConf.is_list(value) else value
            new = _capped(old, caps[name])
            if new != old:
                node[name] = new
                yield f"{key}.{name} {'null' if old is None else old} -> {new}"


def _capped(value: Any, cap: int) -> Any:
    if isinstance(value, list):
        return [_capped(each, cap) for each in value]
    if value is None:
        return cap
    return min(value, cap) if isinstance(value, int) and not isinstance(value, bool) else value


def read_fractions(cfg: Config) -> Config:
    """``cfg`` with values such as ``8/255`` in ``threat``, ``attack`` and ``training`` as numbers.

    So any class gets a float, whether from ``eps: ${threat.eps}`` or from its own YAML, and a number names the
    same folder however it is written.
    """
    cfg = copy.deepcopy(cfg)
    for group in ("threat", "attack", "training"):
        _read_fractions(cfg[group])
    return cfg


def _read_fractions(node: Any) -> None:
    for key in range(len(node)) if OmegaConf.is_list(node) else list(node):
        value = node._get_node(key)
        if OmegaConf.is_config(value):
            if not (value._is_none() or value._is_missing() or value._is_interpolation()):
                _read_fractions(value)
        elif isinstance(number := fraction(value._value()), float):
            node[key] = number


def network_of(run: RecordedRun, trust: bool) -> Config:
    """The activation and model of a run, to be built.

    Raises:
        UserError: if the run folder names a class that is not trusted.
    """
    return OmegaConf.create({group: run.group(group, trust) for group in ("activation", "model")})
