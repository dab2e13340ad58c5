"""Run an experiment in this process, composed as run.py would compose it. No YAML file is parsed twice."""

import copy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import ConfigRepository
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, open_dict, read_write

CONF = Path(__file__).parent.parent / "conf"

OUTPUTS = "paths.outputs=somewhere"
"""A placeholder for the outputs folder, which differs from test to test."""


def launch(outputs: Path, *overrides: str, config_dir: Path | None = None) -> float:
    """Run one experiment; ``config_dir`` is added as by ``--config-dir``. Returns the robust accuracy."""
    from kwta_exp import experiment

    cfg = copy.deepcopy(_composed(overrides, config_dir))
    with read_write(cfg), open_dict(cfg):
        cfg.paths.outputs = str(outputs)
        task = cfg.hydra.overrides.task
        task[list(task).index(OUTPUTS)] = f"paths.outputs={outputs}"
    HydraConfig.instance().set_config(cfg)
    return experiment.run(cfg)


def message_of(overrides: list[str]) -> str | None:
    """The error message of ``python run.py OVERRIDES``; ``None`` if it succeeds."""
    from kwta_exp import experiment
    from kwta_exp.config import ConfigError
    from kwta_exp.errors import shortened
    from kwta_exp.suggest import better_message

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        cfg = copy.deepcopy(cfg)
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
    except Exception as error:
        message = better_message(error, overrides)
        assert message, overrides
        return shortened(message)
    try:
        experiment.run(cfg)
    except ConfigError as error:
        return str(error)
    return None


@cache
def _composed(overrides: tuple[str, ...], config_dir: Path | None) -> DictConfig:
    added = [f"hydra.searchpath=[file://{config_dir}]"] if config_dir else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [*added, OUTPUTS, *overrides], return_hydra_config=True)


def parse_once() -> None:
    """Parse each YAML file of ``conf/`` and of Hydra only once in this process: that halves a composition."""
    load, parsed = ConfigRepository.load_config, dict[tuple[str, str], ConfigResult]()

    def load_once(self: ConfigRepository, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path=config_path, object_type=ObjectType.CONFIG)
        if source is None or not (source.scheme() == "pkg" or source.path == str(CONF)):
            return load(self, config_path)
        if (source.path, config_path) not in parsed:
            loaded = load(self, config_path)
            assert loaded
            parsed[source.path, config_path] = loaded
        return copy.deepcopy(parsed[source.path, config_path])

    ConfigRepository.load_config = load_once  # type: ignore[method-assign]


@contextmanager
def time_limit(seconds: int, what: str) -> Iterator[None]:
    """Fail after ``seconds``, naming the case that hangs."""

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"hangs: {what}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
