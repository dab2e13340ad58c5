"""MLflow: an experiment, with a run for each grid that its jobs are nested in."""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import dataclasses

from kwta_exp.fields import STRICT
from kwta_exp.report.terminal import results_table
from kwta_exp.tracking.base import End, Log, TrackedRun, Tracking, outcome

_SQLITE = "sqlite:///"

_LOCK_SECONDS = 300.0
"""How long a job waits for other jobs of its grid; making the database takes up to ten seconds."""

_RUN, _GRID, _EVALUATION = "kwta_exp.run", "kwta_exp.grid", "kwta_exp.evaluation."
"""The tags by which a run, a grid and an evaluation are found again."""

_STATUS: Mapping[End, str] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}

_MOST_AT_ONCE = 100
"""Parameters that MLflow takes at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class MLflow(Tracking):
    """Runs in an MLflow database.

    Args:
        uri: of the database, ``sqlite:///FILE``, or of a server, ``http://HOST:PORT``.
        artifacts: the folder of files and figures, for a database; a server decides that itself.
        experiment: the name of the experiment; it is made if there is none.
    """

    uri: str
    artifacts: str
    experiment: str

    option = "mlflow"
    modules = ("mlflow", "sqlalchemy", "alembic")
    packages = "mlflow"

    def open(self, run: TrackedRun) -> Log:
        # Both before MLflow is loaded; a user's own values are kept.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        return _MLflowRun(self, run)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other job writes to the SQLite file.

        SQLite has a lock of its own, but two processes that read before they write can fail with "database is
        locked", and two that make the same database or the same grid's run would make it twice.
        """
        if not self.uri.startswith(_SQLITE):
            yield
            return
        file = Path(self.uri.removeprefix(_SQLITE)).absolute()
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{file.name}.lock"), timeout=_LOCK_SECONDS):
            yield


class _MLflowRun(Log):
    def __init__(self, config: MLflow, run: TrackedRun) -> None:
        super().__init__()
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they report each step of making a database
        self._config = config
        with config.locked():
            self._client = MlflowClient(config.uri)
            experiment = self._experiment()
            found = self._found(experiment, _RUN, run.id)
            if found is None:
                self._run = self._begun(experiment, run)
                return
            self._run = found.info.run_id
            self._client.update_run(self._run, "RUNNING")
            if "training/loss" in found.data.metrics:
                history = self._client.get_metric_history(self._run, "training/loss")
                self.epoch = max(each.step for each in history)
            tags = found.data.tags
            self.evaluations = {tag.removeprefix(_EVALUATION) for tag in tags if tag.startswith(_EVALUATION)}
            figures = self._client.list_artifacts(self._run, "figures")
            self.figures = {Path(each.path).name for each in figures}

    def add_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        with self._config.locked():
            self._client.log_batch(self._run, self._metrics(values, epoch))

    def add_evaluation(self, name: str, results: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        verdict = results["masking"]["verdict"]
        with self._config.locked():
            self._client.log_text(self._run, results_table(results, 100), f"evaluation/{name}.txt")
            self._client.log_dict(self._run, dict(results), f"evaluation/{name}.json")
            self._client.log_batch(
                self._run,
                self._metrics(outcome(results), len(self.evaluations) + 1),
                tags=[RunTag("verdict", verdict), RunTag(f"{_EVALUATION}{name}", verdict)],
            )

    def add_figure(self, path: Path) -> None:
        with self._config.locked():
            self._client.log_artifact(self._run, str(path), "figures")

    def close(self, end: End) -> None:
        with self._config.locked():
            self._client.set_terminated(self._run, _STATUS[end])

    def _metrics(self, values: Mapping[str, float], step: int) -> list[Any]:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        return [Metric(name, value, now, step) for name, value in values.items()]

    def _experiment(self) -> str:
        """The id of the experiment, which is made if there is none."""
        name = self._config.experiment
        if (found := self._client.get_experiment_by_name(name)) is not None:
            return str(found.experiment_id)
        is_file = self._config.uri.startswith(_SQLITE)
        place = Path(self._config.artifacts).absolute().as_uri() if is_file else None
        return str(self._client.create_experiment(name, place))

    def _begun(self, experiment: str, run: TrackedRun) -> str:
        """The id of a new run, inside its grid's."""
        from mlflow.entities import Param
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        tags = {_RUN: run.id, "folder": str(run.folder.absolute())}
        if run.grid is not None:
            tags |= {_GRID + ".name": run.grid, MLFLOW_PARENT_RUN_ID: self._grid(experiment, run.grid)}
        begun: str = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        parameters = [Param(name, str(value)) for name, value in run.parameters().items()]
        for first in range(0, len(parameters), _MOST_AT_ONCE):
            self._client.log_batch(begun, params=parameters[first : first + _MOST_AT_ONCE])
        return begun

    def _grid(self, experiment: str, name: str) -> str:
        """The id of a grid's run, which is made if there is none. It is a place and measures nothing."""
        if (found := self._found(experiment, _GRID, name)) is not None:
            return str(found.info.run_id)
        made: str = self._client.create_run(experiment, tags={_GRID: name}, run_name=name).info.run_id
        self._client.set_terminated(made)
        return made

    def _found(self, experiment: str, tag: str, value: str) -> Any:
        found = self._client.search_runs([experiment], f"tags.`{tag}` = '{value}'", max_results=1)
        return found[0] if found else None
