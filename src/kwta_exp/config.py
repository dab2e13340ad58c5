"""From Hydra's configuration to objects and plain values."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
from pydantic import BaseModel, ValidationError

from kwta_exp.data.image_folder import DEATH_OF_WORKER, is_death_of_worker
from kwta_exp.environment import CONF
from kwta_exp.errors import UserError, printable
from kwta_exp.explain import did_you_mean, explain_validation, explanation
from kwta_exp.failures import first_line, is_out_of_memory
from kwta_exp.settings import Inputs, Settings
from kwta_exp.trust import require_buildable

GROUPS = (
    "dataset", "activation", "model", "optimizer", "lr_schedule", "sparsity", "training", "suite", "runtime",
    "tracking", "scale",
)  # fmt: skip
"""The groups of which a run needs one option each."""

NODES = (*(group for group in GROUPS if group != "suite"), "threat", "recipe", "attack")
"""The mappings at the top level of a configuration, ``paths`` and ``evaluation`` apart."""

EXPECTED = {
    "threat": "threat=linf or threat=l2",
    "recipe": "recipe.epochs=N, recipe.batch_size=N and recipe.lr=X",
    "attack": "+attack@attack.NAME=OPTION",
}
"""How the nodes that are not chosen by ``GROUP=OPTION`` are given."""

FACTORIES = ("activation", "model", "optimizer", "lr_schedule")
"""The nodes that are built as partial objects; the data or the network completes them."""

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

Config = DictConfig
"""A composed configuration; modules that only pass it on import the type from here."""


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
        if is_out_of_memory(error):
            raise UserError(
                f"not enough memory: {first_line(error)}; expected a smaller recipe.batch_size or"
                " evaluation.batch_size, or more memory"
            ) from error
        if not is_death_of_worker(error):
            raise
        raise UserError(f"dataset.workers: {DEATH_OF_WORKER} ({error})") from error


def inputs(cfg: DictConfig) -> Inputs:
    """The keys that name files, validated; raises as :func:`settings`."""
    return _read(Inputs, cfg)


def settings(cfg: DictConfig) -> Settings:
    """The plain top-level keys, validated.

    Raises:
        UserError: naming an unknown key, a missing node, or a value and what was expected.
    """
    return _read(Settings, cfg)


def _read(kind: type[M], cfg: DictConfig) -> M:
    known = (*Settings.model_fields, *NODES)
    for name in map(str, cfg):
        if name not in (*known, "hydra"):
            raise UserError(
                f"{name}: unknown key{did_you_mean(name, known)}; expected one of"
                f" {', '.join(Settings.model_fields)} or a group"
            )
    for node in NODES:
        if not OmegaConf.is_dict(value := OmegaConf.select(cfg, node)):
            raise UserError(f"{node}={value!r}: expected {EXPECTED.get(node, f'{node}=OPTION')}")
    return validated(kind, {name: plain(cfg, name) for name in kind.model_fields})


def validated(kind: type[M], content: Mapping[str, Any], key: str = "") -> M:
    """A pydantic model of the content of ``key``; raises a :class:`UserError`."""
    try:
        return kind(**content)
    except ValidationError as error:
        raise UserError(explain_validation(error, key, content)) from error


def require_threat_and_recipe(cfg: DictConfig, dataset: str, trains: bool) -> None:
    """Refuse a dataset of the user's that brings no threat or, where it is needed, no recipe.

    Raises:
        UserError: naming the dataset and what it lacks.
    """
    for node in ("threat", "recipe") if trains else ("threat",):
        if missing := sorted(OmegaConf.missing_keys(cfg[node])):
            raise UserError(
                f"{', '.join(missing)}: not set by dataset={dataset}; expected {EXPECTED[node]}, or a {node} in"
                " the YAML of the dataset"
            )


def plain(cfg: DictConfig, key: str) -> Any:
    """A node with interpolations resolved, as dicts, lists and scalars."""
    node = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def build(cfg: DictConfig, key: str, kind: type[T] | None = None) -> Any:
    """Instantiate the node at ``key``.

    Args:
        cfg: the configuration.
        key: the node's dotted key.
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
    """Check the values of a partial object of a library, which may check little itself, by its signature.

    A value must be a bool where the parameter's annotation or default is one, and a number where that is a
    number.
    """
    parameters = inspect.signature(built.func).parameters if isinstance(built, partial) else {}
    for name, value in plain(cfg, key).items():
        if name not in parameters or value is None:
            continue
        kinds = (parameters[name].annotation, type(parameters[name].default))
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if any(kind in (bool, bool | None, "bool", "bool | None") for kind in kinds):
            if not isinstance(value, bool):
                raise UserError(f"{key}.{name}={value!r}: expected true or false")
        elif any(kind in (int, float, "int", "float") for kind in kinds) and not is_number:
            raise UserError(f"{key}.{name}={value!r}: expected a number")


def call(cfg: DictConfig, key: str, factory: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the partial object that :func:`build` made of ``key``; any error becomes a :class:`UserError`."""
    try:
        return factory(*args, **kwargs)
    except Exception as error:  # libraries refuse values with errors of any type
        raise UserError(explain(error, cfg, key)) from error


def explain(error: BaseException, cfg: DictConfig, key: str) -> str:
    """One message: the key, its value, and what was expected."""
    node = OmegaConf.select(cfg, key)
    return explanation(error, key, plain(cfg, key) if OmegaConf.is_dict(node) else {})


@dataclass(frozen=True)
class CommandLine:
    """What Hydra made of a command line (in a multirun, of this job's part of it).

    Attributes:
        choices: the option chosen in each group, e.g. ``{"dataset": "digits", ...}``.
        overrides: as the user wrote them.
        job: the number of this job in its grid; ``None`` outside a grid.
        sweep: the folder of that grid.
        shares_machine: whether other jobs of the grid run beside it in processes of the same launcher.
    """

    choices: dict[str, str]
    overrides: list[str]
    job: int | None = None
    sweep: Path | None = None
    shares_machine: bool = False

    @classmethod
    def of(cls, hydra: Any) -> "CommandLine":
        """From Hydra's own node of a composed configuration; a group without a single option is left out."""
        chosen = {
            group: option
            for group, option in hydra.runtime.choices.items()
            if isinstance(option, str) and not group.startswith("hydra")
        }
        given: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # "${...}" in it is text
        if hydra.mode != RunMode.MULTIRUN:
            return cls(chosen, list(map(str, given)))
        shares_machine = str(hydra.launcher._target_).endswith(".JoblibLauncher")
        return cls(chosen, list(map(str, given)), int(hydra.job.num), Path(hydra.sweep.dir), shares_machine)

    @classmethod
    def current(cls) -> "CommandLine":
        """That of the job that Hydra is running."""
        return cls.of(HydraConfig.get())

    @property
    def multirun(self) -> bool:
        """Whether this is one job of a grid."""
        return self.job is not None

    @property
    def keys(self) -> list[str]:
        """The key or group of each override."""
        return [override.lstrip("+~").partition("=")[0] for override in self.overrides]

    @property
    def trains(self) -> bool:
        """Whether the network is trained before it is evaluated."""
        return self.choices["training"] != "none"

    def require_choices(self) -> None:
        """Raise a :class:`UserError` where no option, or several, were chosen of one of :data:`GROUPS`."""
        for group in GROUPS:
            if group not in self.choices:
                raise UserError(f"{group}: a run needs one option; expected {group}=OPTION")


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
