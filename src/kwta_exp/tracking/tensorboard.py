"""TensorBoard: event files in a folder for each grid, and in it one for each run."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import dataclasses

from kwta_exp.fields import STRICT
from kwta_exp.report.terminal import results_table
from kwta_exp.tracking.base import End, Log, TrackedRun, Tracking, Value, outcome

ALONE = "runs"
"""The folder of runs outside a grid."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class TensorBoard(Tracking):
    """Event files that ``tensorboard --logdir FOLDER`` shows.

    Args:
        folder: where they are written: ``<folder>/<grid>/<name>/s<seed>-<hash>-<id>/``.
    """

    folder: str

    option = "tensorboard"
    modules = ("tensorboard",)
    packages = "tensorboard"

    def open(self, run: TrackedRun) -> Log:
        root, name = Path(self.folder), f"{run.name}-{run.id[:6]}"
        there = [grid / name for grid in sorted(root.glob("*")) if (grid / name).is_dir()]
        return _Events(there[0] if there else root / (run.grid or ALONE) / name, run.parameters())


class _Events(Log):
    """A file of events in ``folder``, beside those of earlier attempts.

    It is written at once: torch's ``SummaryWriter`` leaves that to a thread, which prints its own error.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, Value]) -> None:
        super().__init__()
        self._folder, self._parameters = folder, parameters
        self._records: Any = None  # until there is something to write
        if folder.exists():
            self._read()

    def add_epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._write(epoch, *(scalar(name, value, new_style=True) for name, value in values.items()))

    def add_evaluation(self, name: str, results: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams, scalar, text

        if not self.evaluations:
            for part in hparams(self._parameters, {})[1:]:  # the first would fix the columns for all runs
                self._write(0, part)
        table = text(f"evaluation/{name}", f"```\n{results_table(results, 100)}\n```")
        values = (scalar(key, value, new_style=True) for key, value in outcome(results).items())
        self._write(len(self.evaluations) + 1, *values, table)

    def add_figure(self, path: Path) -> None:
        from PIL import Image
        from torch.utils.tensorboard.summary import image

        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        self._write(0, image(f"figures/{path.name}", pixels, dataformats="HWC"))

    def close(self, end: End) -> None:
        if self._records:
            self._records.close()

    def _read(self) -> None:
        """What is logged already."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self._folder), size_guidance={"tensors": 0}).Reload()
        tags = events.Tags()["tensors"]
        if "training/loss" in tags:
            self.epoch = max(event.step for event in events.Tensors("training/loss"))
        self.evaluations = {tag.split("/")[1] for tag in tags if tag.startswith("evaluation/")}
        self.figures = {tag.split("/")[1] for tag in events.Tags()["images"] if tag.startswith("figures/")}

    def _write(self, step: int, *parts: Any) -> None:
        """Write one event, which a reader takes as a whole or not at all."""
        from tensorboard.compat.proto.event_pb2 import Event

        if self._records is None:
            self._begin()
        record = Event(wall_time=time.time(), step=step)
        for part in parts:
            record.summary.MergeFrom(part)
        self._records.write(record.SerializeToString())
        self._records.flush()

    def _begin(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._records = RecordWriter(path.open("wb"))
        first = Event(wall_time=time.time(), file_version="brain.Event:2")
        self._records.write(first.SerializeToString())
