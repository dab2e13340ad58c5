"""Weights & Biases: a run for each run folder, in a group for each grid; offline unless the user says so."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import dataclasses

from kwta_exp.fields import STRICT
from kwta_exp.storage import read_json, write_json
from kwta_exp.tracking.base import End, Log, TrackedRun, Tracking, outcome


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class WandB(Tracking):
    """Runs of Weights & Biases.

    Args:
        folder: its ``wandb/`` holds the runs until ``wandb sync`` uploads them.
        project: the project that they belong to.
        entity: the team; ``None``: the user's own.
        mode: ``"offline"`` uses no network.
    """

    folder: str
    project: str
    entity: str | None
    mode: Literal["offline", "online"]

    option = "wandb"
    modules = ("wandb",)
    packages = "wandb"

    def open(self, run: TrackedRun) -> Log:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # before wandb is loaded
        return _WandBRun(self, run)


class _WandBRun(Log):
    """An open run, and ``<id>.json`` beside it: what an offline run holds cannot be read back."""

    def __init__(self, config: WandB, run: TrackedRun) -> None:
        super().__init__()
        import wandb

        place = Path(config.folder)
        (place / "wandb").mkdir(parents=True, exist_ok=True)  # else wandb writes to a temporary folder
        self._record = place / "wandb" / f"{run.id}.json"
        if self._record.exists():
            content = read_json(self._record)
            self.epoch = content["epoch"]
            self.evaluations, self.figures = set(content["evaluations"]), set(content["figures"])
        self._run = wandb.init(
            project=config.project, entity=config.entity, dir=config.folder, id=run.id, name=run.name,
            group=run.grid, config=dict(run.parameters()), mode=config.mode, reinit="create_new",
            resume="allow" if config.mode == "online" else None,
            settings=wandb.Settings(
                console="off", disable_git=True, save_code=False, silent=True, x_disable_stats=True,
            ),
        )  # fmt: skip

    def add_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=epoch)
        self._write(epoch=epoch)

    def add_evaluation(self, name: str, results: Mapping[str, Any]) -> None:
        masking = results["masking"]
        self._run.summary.update({
            **outcome(results), "verdict": masking["verdict"], "explanation": masking["explanation"],
        })  # fmt: skip
        self._write(evaluations=[*self.evaluations, name])

    def add_figure(self, path: Path) -> None:
        import wandb

        self._run.summary[f"figures/{path.stem}"] = wandb.Image(str(path))
        self._write(figures=[*self.figures, path.name])

    def close(self, end: End) -> None:
        self._run.finish(exit_code=0 if end == "finished" else 1)

    def _write(self, **new: Any) -> None:
        """Record what is logged, with what has just been."""
        logged = {"epoch": self.epoch, "evaluations": list(self.evaluations), "figures": list(self.figures)}
        write_json(self._record, logged | new)
