"""From Hydra's configuration to objects and plain values: the one place that knows both."""

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from kwta_exp.data.folder import DEATH_OF_WORKER, is_death_of_worker
from kwta_exp.errors import UserError, printable
from kwta_exp.explain import explain_validation, explanation
from kwta_exp.fields import STRICT, Count, Natural, Sha256
from kwta_exp.run_folder import readable
from kwta_exp.targets import require_trusted

GROUPS = (
    "dataset", "threat", "recipe", "activation", "model", "optimizer", "lr_schedule", "sparsity", "training",
    "attack", "runtime", "scale",
)  # fmt: skip
"""The groups that leave a node of their own in the configuration."""


Config = DictConfig
"""A composed configuration, for those who hand it on."""


class ConfigError(CompactHydraException):
    """A user's mistake, shown by Hydra as one message with exit status 1 and no traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())


class Paths(BaseModel):
    """Where data is read from and runs are written to."""

    model_config = STRICT
    data: str
    outputs: str


class Evaluation(BaseModel):
    """How many test images are attacked, by which attacks, how many at a time, and what is kept of them."""

    model_config = STRICT
    n: Count | None
    diagnostic_n: Count | None
    batch_size: Count
    save_images: bool
    checks_n: Natural
    budget: Count | None
    processes: Count
    search: Literal["exact", "fast"]


class Settings(BaseModel):
    """The plain top-level keys of ``conf/config.yaml``."""

    model_config = STRICT
    seed: Natural
    weights: str | None
    weights_sha256: Sha256 | None
    rerun: bool
    paths: Paths
    evaluation: Evaluation


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what a user got wrong into a :class:`ConfigError`."""
    try:
        yield
    except UserError as error:
        raise ConfigError(str(error)) from error
    except RuntimeError as error:
        if not is_death_of_worker(error):
            raise
        raise ConfigError(f"dataset.workers: {DEATH_OF_WORKER} ({error})") from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: missing; expected {error.full_key}=VALUE") from None
    except OmegaConfBaseException as error:
        # Not "from error": Hydra would print the same again.
        raise ConfigError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from None


def settings(cfg: DictConfig) -> Settings:
    """The top-level keys, checked."""
    for name in map(str, cfg):
        if name not in (*Settings.model_fields, *GROUPS, "hydra"):
            raise UserError(
                f"{name}: unknown key; expected one of {', '.join(Settings.model_fields)} or a group"
            )
    content = {name: plain(cfg, name) for name in Settings.model_fields}
    try:
        return Settings(**content)
    except ValidationError as error:
        raise UserError(explain_validation(error, "", content)) from error


def plain(cfg: DictConfig, key: str) -> Any:
    """A node with interpolations resolved, as dicts, lists and scalars."""
    node = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def build(cfg: DictConfig, key: str) -> Any:
    """Instantiate the node at ``key``.

    Raises:
        UserError: naming the key and value at fault.
    """
    node = OmegaConf.select(cfg, key)
    if not OmegaConf.is_dict(node) or "_target_" not in node:
        raise UserError(f"{key}: nothing to build; expected a mapping with a _target_")
    try:
        built = instantiate(node, _convert_="all")
    except InstantiationException as error:
        at = re.findall(r"full_key: (\S+)", str(error))
        raise UserError(explain(error, cfg, at[-1] if at else key)) from error
    _check_numbers(built, cfg, key)
    return built


def _check_numbers(built: Any, cfg: DictConfig, key: str) -> None:
    """Hold partial objects of libraries, which check little themselves, to their signatures.

    A value must be a bool where the parameter's annotation or default is one, and a number where it is
    a number.
    """
    target = getattr(built, "func", None)
    if target is None:
        return
    parameters = inspect.signature(target).parameters
    for name, value in plain(cfg, key).items():
        if name not in parameters or value is None:
            continue
        kinds = {parameters[name].annotation, type(parameters[name].default)}
        if kinds & {bool, "bool"} and not isinstance(value, bool):
            raise UserError(f"{key}.{name}={value!r}: expected true or false")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if kinds & {int, float, "int", "float"} and not is_number:
            raise UserError(f"{key}.{name}={value!r}: expected a number")


def call(cfg: DictConfig, key: str, factory: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Complete the partial object that :func:`build` made of ``key``, with the same care for errors."""
    try:
        return factory(*args, **kwargs)
    except Exception as error:  # libraries refuse values in every way there is
        raise UserError(explain(error, cfg, key)) from error


def explain(error: BaseException, cfg: DictConfig, key: str) -> str:
    """One message: the key, its value, and what was expected."""
    node = OmegaConf.select(cfg, key)
    return explanation(error, key, plain(cfg, key) if OmegaConf.is_dict(node) else {})


def choices() -> dict[str, str]:
    """Which option of each group was chosen, e.g. ``{"dataset": "digits", ...}``."""
    return {
        group: str(option)
        for group, option in HydraConfig.get().runtime.choices.items()
        if option is not None and not group.startswith("hydra")
    }


def overrides() -> list[str]:
    """The overrides of this run (in a multirun, of this job)."""
    return list(HydraConfig.get().overrides.task)


def is_multirun() -> bool:
    """Whether this is one job of a grid."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def yaml_of(content: Any) -> str:
    """YAML of a configuration (interpolations as they are) or of plain values."""
    return OmegaConf.to_yaml(content if OmegaConf.is_config(content) else OmegaConf.create(content))


SCALED = ("dataset", "evaluation", "recipe", "model", "training", "attack")
"""Where a scale's caps hold."""


class Scale(BaseModel):
    """``conf/scale/*.yaml``: the largest number for each name, and what to build instead of what."""

    model_config = STRICT
    name: str
    caps: dict[str, Natural]
    instead: dict[str, dict[str, Any]]


def apply_scale(cfg: DictConfig, nodes: Sequence[str] = SCALED) -> str:
    """Bring every number that ``scale.caps`` names down to its cap, and say the scale's name.

    A name is capped wherever it stands in ``nodes``, in lists too; null, where it is the value, stands for
    more than the cap. A target that ``scale.instead`` names is replaced.
    """
    content = plain(cfg, "scale")
    try:
        scale = Scale(**content)
    except ValidationError as error:
        raise UserError(explain_validation(error, "scale", content)) from error
    for name, attack in plain(cfg, "attack").items() if scale.instead else ():
        if isinstance(attack, dict) and (other := scale.instead.get(attack.get("_target_", ""))):
            OmegaConf.update(cfg, f"attack.{name}", {**attack, **other}, force_add=True)
    for node in nodes:
        found = OmegaConf.select(cfg, node)
        if OmegaConf.is_config(found):
            _cap(cfg, node, found, scale.caps)
    return scale.name


def _cap(cfg: DictConfig, at: str, content: Any, caps: Mapping[str, int]) -> None:
    for name in content:
        if OmegaConf.is_missing(content, name):
            continue
        key, value = f"{at}.{name}", content[name]
        if OmegaConf.is_dict(value):
            _cap(cfg, key, value, caps)
        elif name in caps:
            plain_value = OmegaConf.to_container(value) if OmegaConf.is_list(value) else value
            OmegaConf.update(cfg, key, _capped(plain_value, caps[name]))


def _capped(value: Any, cap: int) -> Any:
    if isinstance(value, list):
        return [_capped(each, cap) for each in value]
    if value is None:
        return cap
    return min(value, cap) if isinstance(value, int) and not isinstance(value, bool) else value


def run_name(cfg: DictConfig, chosen: Mapping[str, str], scale: str) -> str:
    """``<dataset>-<model>-<activation and its amount>-<training>``, after the scale if it is not full."""
    activation = plain(cfg, "activation")
    amount = "".join(
        f"{prefix}{activation[name]}"
        for name, prefix in (("ratio", ""), ("k", ""), ("group_size", ""))
        if activation.get(name) is not None
    )
    if (final := OmegaConf.select(cfg, "sparsity.final")) is not None:
        amount += f"to{final}"
    parts = (
        *([scale] if scale != "full" else []),
        chosen["dataset"], chosen["model"], chosen["activation"] + amount, chosen["training"],
    )  # fmt: skip
    return "-".join(readable(part) for part in parts)


ADOPTED = ("dataset", "threat", "activation", "model")


def adopt_ratio(cfg: DictConfig, ratio: float, given: Sequence[str]) -> None:
    """When weights are only evaluated: the ratio that they were trained to, unless the command line has one."""
    keys = [override.lstrip("+~").split("=")[0] for override in given]
    if "activation.ratio" not in keys and OmegaConf.select(cfg, "activation.ratio") is not None:
        OmegaConf.update(cfg, "activation.ratio", ratio)


def adopt_run(cfg: DictConfig, chosen: dict[str, str], run: Path, given: Sequence[str]) -> None:
    """When a run is only evaluated, take from it what the command line leaves open.

    Its dataset, threat, activation and model replace the defaults in ``cfg`` and ``chosen``, except
    for groups chosen in the overrides ``given``; single values given there (``threat.eps=0.05``)
    stay as given.

    Raises:
        UserError: if the folder lacks its files, or names a class that is not this project's.
    """
    source, recorded = recorded_config(run), _mapping(run / "overrides.yaml")
    keys = [re.split("=", override.lstrip("+~"), maxsplit=1)[0] for override in given]
    values = {key: OmegaConf.select(cfg, key) for key in keys if key.split(".")[0] in ADOPTED}
    for group in ADOPTED:
        if group in keys or group not in source:
            continue
        check_trust(source, group, run)
        OmegaConf.update(cfg, group, source[group], merge=False, force_add=True)
        chosen[group] = str((recorded.get("choices") or {}).get(group, "unnamed"))
    for key, value in values.items():
        if "." in key:
            OmegaConf.update(cfg, key, value, force_add=True)


DATA = "${oc.env:KWTA_EXP_DATA,data}"
"""What ``paths.data`` is in ``conf/config.yaml``."""


def recorded_config(run: Path) -> DictConfig:
    """What a run folder says of its :data:`ADOPTED` groups and of where its data lay, and nothing else of it.

    Nothing is resolved, and nothing may be built before :func:`check_trust`.
    """
    content = OmegaConf.to_container(_mapping(run / "config.yaml"), resolve=False)
    assert isinstance(content, dict)
    paths = content.get("paths")
    data = paths.get("data") if isinstance(paths, dict) else None
    if data == DATA or not isinstance(data, str):
        data = os.environ.get("KWTA_EXP_DATA", "data")
    kept = {group: content[group] for group in ADOPTED if group in content}
    if "${" in data or any(not isinstance(value, dict) for value in kept.values()):
        raise UserError(f"weights={run}: its config.yaml is not one that a run of this project writes")
    return OmegaConf.create({"paths": {"data": data}, **kept})


def check_trust(source: DictConfig, group: str, run: Path) -> None:
    """Refuse to build what a run folder names and this project does not have.

    Args:
        source: from :func:`recorded_config`.
        group: one of :data:`ADOPTED`.
        run: the folder, for the message.

    Raises:
        UserError: naming it.
    """
    content = OmegaConf.to_container(source, resolve=False)
    assert isinstance(content, dict)
    require_trusted(content[group], group, run)


def _mapping(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"weights={path.parent}: no readable {path.name} there ({error})") from error
    if not isinstance(content, DictConfig):
        raise UserError(f"weights={path.parent}: its {path.name} is no mapping")
    return content
