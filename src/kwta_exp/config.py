"""From Hydra's configuration to objects and plain values: the one place that knows both."""

import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from kwta_exp.errors import UserError
from kwta_exp.fields import STRICT, Count, Natural
from kwta_exp.run_folder import readable
from kwta_exp.storage import sha256_of_file

GROUPS = (
    "dataset", "threat", "recipe", "activation", "model", "optimizer", "lr_schedule", "training",
    "attack", "runtime",
)  # fmt: skip
"""The groups that leave a node of their own in the configuration."""


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
    """How many test images are attacked, how many at a time, and which weights are judged."""

    model_config = STRICT
    n: Count | None
    batch_size: Count


class Settings(BaseModel):
    """The plain top-level keys of ``conf/config.yaml``."""

    model_config = STRICT
    seed: Natural
    weights: str | None
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
        raise UserError(_explain_validation(error, "", content)) from error


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
    values = plain(cfg, key) if OmegaConf.is_dict(node) else {}
    cause = _root_cause(error)
    if isinstance(cause, ValidationError):
        return _explain_validation(cause, key, values)
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(cause, ImportError) or "Error locating target" in str(error):
        return (
            f"{key}._target_={values.get('_target_')}: cannot be imported ({cause});"
            " expected the dotted path of an importable class or function"
        )
    if culprit := _culprit(values, str(cause)):
        return f"{key}.{culprit}={values[culprit]!r}: {cause}"
    arguments = {k: v for k, v in values.items() if not k.startswith("_") and not isinstance(v, dict)}
    shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items()) or "no arguments"
    return f"{key}: {(str(cause) or type(cause).__name__).splitlines()[0]} (with {shown})"


def with_facts(factory: Callable[..., Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``facts`` about the data that a network's signature asks for."""
    target = getattr(factory, "func", factory)
    names = inspect.signature(target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values()):
        return dict(facts)
    return {name: value for name, value in facts.items() if name in names}


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


def run_name(cfg: DictConfig, chosen: Mapping[str, str]) -> str:
    """``<dataset>-<model>-<activation and its amount>-<training>``."""
    activation = plain(cfg, "activation")
    amount = "".join(
        f"{prefix}{activation[name]}"
        for name, prefix in (("ratio", ""), ("k", ""), ("group_size", ""))
        if activation.get(name) is not None
    )
    parts = (
        chosen["dataset"], chosen["model"], chosen["activation"] + amount, chosen["training"],
    )  # fmt: skip
    return "-".join(readable(part) for part in parts)


ADOPTED = ("dataset", "threat", "activation", "model")

TRUSTED = frozenset({
    "kwta_exp.activations.KWTA", "kwta_exp.activations.LWTA", "torch.nn.ReLU",
    "kwta_exp.models.CNN", "kwta_exp.models.MLP", "kwta_exp.models.ResNet",
    "kwta_exp.data.datasets.Arrays", "kwta_exp.data.datasets.CIFAR10",
    "kwta_exp.data.datasets.Digits", "kwta_exp.data.datasets.FashionMNIST",
    "kwta_exp.attacks.Threat",
})  # fmt: skip
"""What a run folder may have built: it can come from anybody, and a ``_target_`` can be any function."""


def adopt_run(cfg: DictConfig, chosen: dict[str, str], run: Path, given: Sequence[str]) -> None:
    """When a run is only evaluated, take from it what the command line leaves open.

    Its dataset, threat, activation and model replace the defaults in ``cfg`` and ``chosen``, except
    for groups chosen in the overrides ``given``; single values given there (``threat.eps=0.05``)
    stay as given.

    Raises:
        UserError: if the folder lacks its files, or names a class that is not this project's.
    """
    source, recorded = (_mapping(run / name) for name in ("config.yaml", "overrides.yaml"))
    keys = [re.split("=", override.lstrip("+~"), maxsplit=1)[0] for override in given]
    values = {key: OmegaConf.select(cfg, key) for key in keys if key.split(".")[0] in ADOPTED}
    for group in ADOPTED:
        if group in keys or group not in source:
            continue
        for target in targets(OmegaConf.to_container(source[group])):
            if target not in TRUSTED:
                raise UserError(
                    f"weights={run}: its {group} is a {target}, which is not this project's and is not"
                    f" built on a folder's word; expected {group}=... on the command line"
                )
        OmegaConf.update(cfg, group, source[group], merge=False, force_add=True)
        chosen[group] = str((recorded.get("choices") or {}).get(group, "unnamed"))
    for key, value in values.items():
        if "." in key:
            OmegaConf.update(cfg, key, value, force_add=True)


def targets(content: Any) -> Iterator[str]:
    """Every ``_target_`` in a plain configuration."""
    if isinstance(content, Mapping):
        if "_target_" in content:
            yield str(content["_target_"])
        for value in content.values():
            yield from targets(value)
    elif isinstance(content, list):
        for value in content:
            yield from targets(value)


def local_code(content: Any) -> dict[str, str]:
    """SHA-256 of the source files that the targets in ``content`` come from, outside installed packages.

    A user's own class decides results as much as any value does, and it has no version.
    """
    digests = {}
    for target in targets(content):
        module = target
        while "." in module:
            module = module.rpartition(".")[0]
            if module.split(".")[0] in ("kwta_exp", "torch", "torchvision", "foolbox"):
                break
            try:
                origin = getattr(importlib.util.find_spec(module), "origin", None)
            except (ImportError, ValueError):
                continue
            if (
                origin
                and Path(origin).is_file()
                and not {"site-packages", "dist-packages"} & {*Path(origin).parts}
            ):
                digests[module] = sha256_of_file(Path(origin))
                break
    return digests


def _mapping(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"weights={path.parent}: no readable {path.name} there ({error})") from error
    if not isinstance(content, DictConfig):
        raise UserError(f"weights={path.parent}: its {path.name} is no mapping")
    return content


def _explain_validation(error: ValidationError, key: str, values: Mapping[str, Any]) -> str:
    return "\n".join(_explain_field(detail, key, values) for detail in error.errors(include_url=False))


def _explain_field(detail: Any, key: str, values: Any) -> str:
    path = [key] if key else []
    for part in detail["loc"]:
        if (isinstance(values, Mapping) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        ):
            path.append(str(part))
            values = values[part]
        elif len(path) <= 1 and isinstance(part, str):
            path.append(part)  # an argument that is missing
            break
    where = ".".join(path)
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if detail["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}: missing; expected a value"
    if "unexpected" in detail["type"] or detail["type"] == "extra_forbidden":
        return f"{where}: unknown key; see the group's YAML files for those it takes"
    if isinstance(values, Mapping):
        return f"{where}: {message}"
    return f"{where}={values!r}: {message}"


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None and not isinstance(error, ValidationError | UserError):
        error = error.__cause__
    return error


def _culprit(values: Mapping[str, Any], message: str) -> str | None:
    """The one key whose value a library's message quotes, or the one text where it wanted no ``str``."""
    scalars = {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and isinstance(value, int | float | str) and not isinstance(value, bool)
    }
    quoted = [
        name
        for name, value in scalars.items()
        if re.search(rf"(?<![\w.]){re.escape(str(value))}(?![\w.])", message)
    ]
    if len(quoted) == 1:
        return quoted[0]
    texts = [name for name, value in scalars.items() if isinstance(value, str)]
    return texts[0] if len(texts) == 1 and "str" in message else None
