"""``scale=tiny``: every number that makes a run long, brought down."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, NonNegativeInt, ValidationError

from kwta_exp.config import plain
from kwta_exp.errors import UserError
from kwta_exp.explain import explain_validation
from kwta_exp.fields import STRICT

log = logging.getLogger(__name__)

SCALED = ("dataset", "evaluation", "recipe", "model", "training", "attack")
"""Where a scale's caps hold."""


class Scale(BaseModel):
    """``conf/scale/*.yaml``: the largest number for each name, and what to build instead of what."""

    model_config = STRICT
    name: str
    caps: dict[str, NonNegativeInt]
    instead: dict[str, dict[str, Any]]


def apply_scale(cfg: DictConfig, nodes: Sequence[str] = SCALED) -> str:
    """Bring every number that ``scale.caps`` names down to its cap, and say the scale's name.

    A name is capped wherever it stands in ``nodes``, in lists too; null, where it is the value, stands for
    more than the cap. A target that ``scale.instead`` names is replaced. What changed is logged.
    """
    content = plain(cfg, "scale")
    try:
        scale = Scale(**content)
    except ValidationError as error:
        raise UserError(explain_validation(error, "scale", content)) from error
    changes: list[str] = []
    for name, attack in plain(cfg, "attack").items() if scale.instead else ():
        if isinstance(attack, dict) and (other := scale.instead.get(str(attack.get("_target_", "")))):
            OmegaConf.update(cfg, f"attack.{name}", {**attack, **other}, force_add=True)
            changes.append(f"attack.{name} is {str(other.get('_target_', 'changed')).rpartition('.')[2]}")
    for node in nodes:
        found = OmegaConf.select(cfg, node)
        if OmegaConf.is_config(found):
            _cap(cfg, node, found, scale.caps, changes)
    if changes:
        log.info("scale=%s: %s", scale.name, ", ".join(changes))
    return scale.name


def _cap(cfg: DictConfig, at: str, content: Any, caps: Mapping[str, int], changes: list[str]) -> None:
    for name in content:
        if OmegaConf.is_missing(content, name):
            continue
        key, value = f"{at}.{name}", content[name]
        if OmegaConf.is_dict(value):
            _cap(cfg, key, value, caps, changes)
        elif name in caps:
            old = OmegaConf.to_container(value) if OmegaConf.is_list(value) else value
            new = _capped(old, caps[name])
            if new != old:
                OmegaConf.update(cfg, key, new)
                changes.append(f"{key} {'null' if old is None else old} -> {new}")


def _capped(value: Any, cap: int) -> Any:
    if isinstance(value, list):
        return [_capped(each, cap) for each in value]
    if value is None:
        return cap
    return min(value, cap) if isinstance(value, int) and not isinstance(value, bool) else value
