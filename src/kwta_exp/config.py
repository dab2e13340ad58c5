"""From Hydra's configuration to objects and plain values: the one place that knows both."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError

from kwta_exp.data.image_folder import DEATH_OF_WORKER, is_death_of_worker
from kwta_exp.environment import CONF
from kwta_exp.errors import UserError, printable
from kwta_exp.explain import did_you_mean, explain_validation, explanation
from kwta_exp.fields import fraction
from kwta_exp.recorded import RecordedRun
from kwta_exp.run_folder import readable
from kwta_exp.settings import Settings
from kwta_exp.trust import require_buildable

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

    def __str__(self) -> str:
        return printable(super().__str__())


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise for a user's mistake into a :class:`UserError`."""
    try:
        yield
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: missing; expected {error.full_key}=VALUE") from None
    except OmegaConfBaseException as error:
        # Not "from error": Hydra would print the same again.
        raise UserError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from None
    except HydraException as error:
        raise UserError(str(error)) from None
    except MemoryError as error:
        raise UserError(f"not enough memory: {error or 'the machine has no more'}") from error
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{named}{error.strerror or error}") from error
    except RuntimeError as error:
        if not is_death_of_worker(error):
            raise
        raise UserError(f"dataset.workers: {DEATH_OF_WORKER} ({error})") from error


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


@dataclass(frozen=True)
class CommandLine:
    """What Hydra made of a command line (in a multirun, of this job's share of it).

    Attributes:
        choices: the option chosen in each group, e.g. ``{"dataset": "digits", ...}``.
        overrides: as they were given.
        multirun: whether this is one job of a grid.
    """

    choices: dict[str, str]
    overrides: list[str]
    multirun: bool

    @classmethod
    def of(cls, hydra: Any) -> "CommandLine":
        """From Hydra's own node of a composed configuration; a group without one option is left out."""
        chosen = {
            group: option
            for group, option in hydra.runtime.choices.items()
            if isinstance(option, str) and not group.startswith("hydra")
        }
        given: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # "${...}" in it is text
        return cls(chosen, list(map(str, given)), hydra.mode == RunMode.MULTIRUN)

    def require_choices(self) -> None:
        """Raise a :class:`UserError` where none or several options were chosen of a group that needs one."""
        for group in (*(group for group in GROUPS if group != "attack"), "suite"):
            if group not in self.choices:
                raise UserError(f"{group}: a run needs one option; expected {group}=OPTION")

    @classmethod
    def current(cls) -> "CommandLine":
        """That of the job that Hydra is running."""
        return cls.of(HydraConfig.get())


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


def composed(overrides: Sequence[str], config_dir: Path | None = None) -> tuple[DictConfig, CommandLine]:
    """What ``run.py`` would be given for these overrides, composed without running Hydra.

    Args:
        overrides: as on the command line.
        config_dir: a folder of the user's own options, as ``--config-dir`` names one.
    """
    own = [f"hydra.searchpath=[file://{config_dir.absolute()}]"] if config_dir else []
    outer = GlobalHydra.instance().hydra  # of an application that calls this
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", [*own, *overrides], return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = outer
    line = CommandLine.of(cfg.hydra)
    OmegaConf.set_struct(cfg, False)
    del cfg.hydra
    OmegaConf.set_struct(cfg, True)
    return cfg, line


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


def adopt_ratio(cfg: DictConfig, ratio: float, given: Sequence[str]) -> None:
    """When weights are only evaluated: the ratio that they were trained to, unless the command line has one."""
    keys = [override.lstrip("+~").split("=")[0] for override in given]
    if "activation.ratio" not in keys and OmegaConf.select(cfg, "activation.ratio") is not None:
        OmegaConf.update(cfg, "activation.ratio", ratio)


def adopt_run(cfg: DictConfig, chosen: dict[str, str], run: RecordedRun, given: Sequence[str]) -> None:
    """When a run is only evaluated, take from it what the command line leaves open.

    Its dataset, threat, activation and model replace the defaults in ``cfg`` and ``chosen``, except
    for groups chosen in the overrides ``given``; single values given there (``threat.eps=0.05``)
    stay as given. With ``cfg.trust`` the folder is believed whole.

    Raises:
        UserError: if the folder names something that is not believed.
    """
    keys = [re.split("=", override.lstrip("+~"), maxsplit=1)[0] for override in given]
    values = {key: OmegaConf.select(cfg, key) for key in keys if key.split(".")[0] in run.groups}
    for group in run.groups:
        if group in keys:
            continue
        OmegaConf.update(cfg, group, run.group(group, cfg.trust), merge=False, force_add=True)
        chosen[group] = run.choices[group]
    for key, value in values.items():
        if "." in key:
            OmegaConf.update(cfg, key, value, force_add=True)


def recorded_network(run: RecordedRun, trust: bool) -> DictConfig:
    """The configuration of a run's network, to be built: its activation and model.

    Raises:
        UserError: if the folder names something that is not believed.
    """
    return OmegaConf.create({group: run.group(group, trust) for group in ("activation", "model")})
