"""From Hydra's configuration to objects and plain values: the one place that knows both."""

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from kwta_exp.errors import UserError, shortened
from kwta_exp.explain import did_you_mean, explain_validation, explanation
from kwta_exp.fields import STRICT, Count, Natural, Sha256, fraction
from kwta_exp.run_folder import readable
from kwta_exp.targets import require_buildable, require_trusted

GROUPS = (
    "dataset", "threat", "recipe", "activation", "model", "optimizer", "lr_schedule", "sparsity", "training",
    "attack", "runtime", "scale",
)  # fmt: skip
"""The groups that leave a node of their own in the configuration."""


FACTORIES = ("activation", "model", "optimizer", "lr_schedule")
"""The nodes that are built in part and completed later, with what only the data or the network tells."""

T = TypeVar("T")

Config = DictConfig
"""A composed configuration, for those who hand it on."""


class ConfigError(CompactHydraException):
    """A user's mistake, shown by Hydra as one message with exit status 1 and no traceback."""


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
        raise ConfigError(shortened(str(error))) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: missing; expected {error.full_key}=VALUE") from None
    except OmegaConfBaseException as error:
        # Not "from error": Hydra would print the same again.
        said = f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}"
        raise ConfigError(shortened(said)) from None
    except MemoryError as error:
        raise ConfigError(f"not enough memory: {error or 'the machine has no more'}") from error
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        raise ConfigError(shortened(f"{named}{error.strerror or error}")) from error


def settings(cfg: DictConfig) -> Settings:
    """The top-level keys, checked.

    Raises:
        UserError: naming an unknown key, a group that is missing, or a value and what was expected.
    """
    known = (*Settings.model_fields, *GROUPS)
    for name in map(str, cfg):
        if name not in (*known, "hydra"):
            raise UserError(
                f"{name}: unknown key{did_you_mean(name, known)}; expected one of"
                f" {', '.join(Settings.model_fields)} or a group"
            )
    for group in GROUPS:
        if not isinstance(plain(cfg, group), dict):
            raise UserError(f"{group}={plain(cfg, group)!r}: a run needs its {group}; expected {group}=OPTION")
    content = {name: plain(cfg, name) for name in Settings.model_fields}
    try:
        return Settings(**content)
    except ValidationError as error:
        raise UserError(explain_validation(error, "", content)) from error


def plain(cfg: DictConfig, key: str) -> Any:
    """A node with interpolations resolved, as dicts, lists and scalars."""
    node = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def build(cfg: DictConfig, key: str, kind: type[T] | None = None) -> Any:
    """Instantiate the node at ``key``.

    Args:
        cfg: the configuration.
        key: where the node stands.
        kind: what it must be an instance of.

    Raises:
        UserError: naming the key and value at fault.
    """
    node = OmegaConf.select(cfg, key)
    if not OmegaConf.is_dict(node) or "_target_" not in node:
        raise UserError(f"{key}: nothing to build; expected a mapping with a _target_")
    require_buildable(plain(cfg, key), key)
    if key in FACTORIES and not node.get("_partial_", False):
        raise UserError(f"{key}._partial_=False: expected true, since the data or the network completes it")
    try:
        built = instantiate(node, _convert_="all")
    except InstantiationException as error:
        at = re.findall(r"full_key: (\S+)", str(error))
        raise UserError(explain(error, cfg, at[-1] if at else key)) from error
    if kind is not None and not isinstance(built, kind):
        raise UserError(
            f"{key}._target_={node._target_}: makes a {type(built).__name__};"
            f" expected a {kind.__module__}.{kind.__qualname__}"
        )
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
        kinds = (parameters[name].annotation, type(parameters[name].default))
        if any(kind in (bool, bool | None, "bool", "bool | None") for kind in kinds):
            if not isinstance(value, bool):
                raise UserError(f"{key}.{name}={value!r}: expected true or false")
        elif any(kind in (int, float, "int", "float") for kind in kinds) and (
            isinstance(value, bool) or not isinstance(value, int | float)
        ):
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
    """Which option of each group was chosen, e.g. ``{"dataset": "digits", ...}``.

    Raises:
        UserError: where none or several were of a group that a run needs one of.
    """
    chosen = {
        group: option
        for group, option in HydraConfig.get().runtime.choices.items()
        if option is not None and not group.startswith("hydra")
    }
    for group in (*(group for group in GROUPS if group != "attack"), "suite"):
        if not isinstance(chosen.get(group), str):
            raise UserError(f"{group}: a run needs one option; expected {group}=OPTION")
    return {group: str(option) for group, option in chosen.items()}


def read_fractions(cfg: DictConfig, groups: Sequence[str] = ("threat", "attack", "training")) -> None:
    """Make numbers of values such as ``8/255``, wherever they stand in ``groups``.

    So a class that knows nothing of fractions gets a float, be it by ``eps: ${threat.eps}`` or in its own
    YAML, and the same number gives the same folder however it is written.
    """
    for group in groups:
        node = OmegaConf.select(cfg, group)
        if OmegaConf.is_config(node):
            _read_fractions(node)


def _read_fractions(node: Any) -> None:
    for key in range(len(node)) if OmegaConf.is_list(node) else list(node):
        value = node._get_node(key)
        if OmegaConf.is_config(value):
            if not (value._is_none() or value._is_missing() or value._is_interpolation()):
                _read_fractions(value)
        elif isinstance(number := fraction(value._value()), float):
            node[key] = number


def overrides() -> list[str]:
    """The overrides of this run (in a multirun, of this job)."""
    return list(HydraConfig.get().overrides.task)


def is_multirun() -> bool:
    """Whether this is one job of a grid."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def yaml_of(content: Any) -> str:
    """YAML of a configuration (interpolations as they are) or of plain values."""
    return OmegaConf.to_yaml(content if OmegaConf.is_config(content) else OmegaConf.create(content))


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
