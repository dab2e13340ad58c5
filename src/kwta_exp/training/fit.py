"""The training loop: epochs, validation, checkpoints; killed at any moment, it goes on where it was."""

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kwta_exp.checkpoint import Weights, resumed_state, save_state, weights_of
from kwta_exp.data.batches import Batch, Split, TrainingBatches
from kwta_exp.errors import UserError
from kwta_exp.progress import Progress
from kwta_exp.randomness import key
from kwta_exp.training.objectives import Training
from kwta_exp.training.objectives.base import correct
from kwta_exp.training.sparsity import Sparsity, set_ratio

log = logging.getLogger(__name__)

EpochRecord = dict[str, Any]

STATE = {
    "model", "optimizer", "schedule", "epoch", "step", "history", "best", "best_epoch", "memory", "average",
    "ratio", "running",
}  # fmt: skip
"""What a training state holds."""


@dataclass(frozen=True)
class Fitted:
    """The outcome of training: weights of the best and of the last epoch, the sparsity ratio of both where
    a schedule set it, and every epoch's record.
    """

    best: Weights
    best_epoch: int
    last: Weights
    sparsity_ratio: float | None
    history: list[EpochRecord]


@dataclass
class _Running:
    """Sums over the batches of an epoch, kept on the device so that no step waits for them.

    ``judged`` counts an image once for each step taken on it, ``images`` once.
    """

    loss: Tensor
    correct: Tensor
    judged: int
    images: int
    seconds: float

    @classmethod
    def zero(cls, device: torch.device) -> "_Running":
        return cls(torch.zeros((), device=device), torch.zeros((), device=device), 0, 0, 0.0)

    def add(self, loss: Tensor, right_N: Tensor) -> None:
        """PositiveInt a step's mean loss and which of its images were classified correctly."""
        self.loss += loss * len(right_N)
        self.correct += right_N.sum()
        self.judged += len(right_N)

    def means(self) -> EpochRecord:
        return {
            "loss": self.loss.item() / self.judged,
            "accuracy": self.correct.item() / self.judged,
            "images_per_second": self.images / self.seconds,
        }


def fit(
    model: nn.Module,
    training: Training,
    batches: TrainingBatches,
    val: Split,
    optimizer_factory: Callable[..., Optimizer],
    schedule_factory: Callable[..., LRScheduler],
    sparsity: Sparsity,
    fabric: Fabric,
    state_path: Path,
    on_epoch: Callable[[list[EpochRecord]], None],
    checkpoint_seconds: float = 300.0,
    compiled: bool = False,
) -> Fitted:
    """Train ``model`` and return its best and last weights.

    All state between two moments is in ``state_path``: written after each epoch and, inside long
    ones, every ``checkpoint_seconds``. Randomness is a function of (seed, epoch, step, image), so a
    resumed run is the uninterrupted one, bit for bit on a CPU with the same threads.

    Args:
        model: the network, on any device.
        training: the method (its loss, epochs).
        batches: what to learn from.
        val: images that choose the best epoch, by robust accuracy where the method has an attack (the last
            epochs of adversarial training are often not its most robust: Rice, Wong and Kolter, "Overfitting in
            adversarially robust deep learning", ICML 2020) and by accuracy where not; of equal epochs the
            later one.
        optimizer_factory: called with the parameters.
        schedule_factory: called with the optimizer; stepped once an epoch.
        sparsity: the ratio of each epoch. The best epoch is then chosen among those of the last ratio.
        fabric: device and precision.
        state_path: where the state lives.
        on_epoch: called after every epoch with the records of all so far.
        checkpoint_seconds: longest stretch of work that a kill may cost.
        compiled: learn and attack through ``torch.compile``, with a copy of ``model``.

    Raises:
        UserError: if the loss stops being finite, or the state file is of another training.
    """
    session = _Session(
        model, training, batches, val, optimizer_factory, schedule_factory, sparsity, fabric, state_path,
        compiled,
    )  # fmt: skip
    if session.restore():
        on_epoch(session.history)
    done = session.epoch * len(batches) + session.step
    with Progress("training", training.epochs * len(batches), "step", start=done) as progress:
        while session.epoch < training.epochs:
            session.train_epoch(progress, checkpoint_seconds)
            session.end_epoch()
            on_epoch(session.history)

    return session.outcome()


class _Session:
    """A training in progress: what changes as it goes, all of it in ``state_path`` at a checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        batches: TrainingBatches,
        val: Split,
        optimizer_factory: Callable[..., Optimizer],
        schedule_factory: Callable[..., LRScheduler],
        sparsity: Sparsity,
        fabric: Fabric,
        state_path: Path,
        compiled: bool,
    ) -> None:
        if compiled:
            model = copy.deepcopy(model)
            model.compile()
        self.model, self.training, self.batches, self.val = model, training, batches, val
        self.sparsity, self.fabric, self.state_path = sparsity, fabric, state_path
        self.optimizer = optimizer_factory(model.parameters())
        self.schedule = schedule_factory(self.optimizer)
        self.wrapped, self.wrapped_optimizer = fabric.setup(model, self.optimizer)
        self.average = _average(model, training.ema_decay)

        self.epoch = self.step = 0
        self.history: list[EpochRecord] = []
        self.best: Weights = {}
        self.best_epoch = 0
        self.memory: dict[str, Tensor] = {}
        self.running = _Running.zero(fabric.device)

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and kept: the average, where there is one."""
        return self.average.module if self.average else self.model

    @property
    def ratio(self) -> float | None:
        """The sparsity ratio that the schedule wants in this epoch."""
        return self.sparsity.ratio(self.epoch, self.training.epochs)

    @property
    def final_ratio(self) -> float | None:
        return self.sparsity.ratio(self.training.epochs - 1, self.training.epochs)

    def restore(self) -> bool:
        """Go back to the last checkpoint, if it is there and whole."""
        if (state := resumed_state(self.state_path, STATE)) is None:
            return False
        try:
            self._adopt(state)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"training state {self.state_path}: {error}; expected rerun=true") from error
        log.info("continuing at epoch %d, step %d", self.epoch + 1, self.step)
        return True

    def _adopt(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.history, self.best, self.best_epoch = state["history"], state["best"], state["best_epoch"]
        self.memory = {name: tensor.to(self.fabric.device) for name, tensor in state["memory"].items()}
        if self.average:
            self.average.load_state_dict(state["average"])
        sums = {name: state["running"][name].to(self.fabric.device) for name in ("loss", "correct")}
        self.running = _Running(**{**state["running"], **sums})
        if state["ratio"] != self.ratio:
            raise ValueError(f"at ratio {state['ratio']}, where the schedule says {self.ratio}")

    def checkpoint(self) -> None:
        """Write everything that :meth:`restore` needs."""
        save_state(
            self.state_path,
            {
                "model": weights_of(self.model),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "epoch": self.epoch,
                "step": self.step,
                "history": self.history,
                "best": self.best,
                "best_epoch": self.best_epoch,
                "memory": self.memory,
                "average": weights_of(self.average) if self.average else None,
                "ratio": self.ratio,
                "running": vars(self.running),
            },
        )

    def train_epoch(self, progress: Progress, checkpoint_seconds: float) -> None:
        """Learn from the batches of this epoch that are still to come."""
        ratio = self.ratio
        if ratio is not None:
            set_ratio(self.model, ratio)
            set_ratio(self.judged, ratio)

        self.wrapped.train()
        started = time.monotonic()
        for batch in self.batches.epoch(self.epoch, start=self.step):
            # Dropout and the like draw from torch's own generator.
            torch.manual_seed(key(self.batches.seed, "step", self.epoch, self.step))
            self._learn(batch)
            self.running.images += len(batch.y)
            self.step += 1

            progress.advance()
            elapsed = time.monotonic() - started
            if progress.due:
                _show(progress, self.running, self.epoch, self.training.epochs, self.running.seconds + elapsed)
            if elapsed > checkpoint_seconds and self.step < len(self.batches):
                self.running.seconds += elapsed
                self.checkpoint()
                started = time.monotonic()
        self.running.seconds += time.monotonic() - started

    def _learn(self, batch: Batch) -> None:
        """Take every step that the method wants to take on ``batch``."""
        losses = self.training.losses(self.wrapped, batch, self.memory)
        while True:
            with self.fabric.autocast():
                found = next(losses, None)
            if found is None:
                return
            loss, logits = found
            self.wrapped_optimizer.zero_grad()
            self.fabric.backward(loss)
            if self.training.clip_norm is not None:
                self.fabric.clip_gradients(
                    self.wrapped,
                    self.wrapped_optimizer,
                    max_norm=self.training.clip_norm,
                    error_if_nonfinite=False,  # the end of the epoch says it better
                )
            self.wrapped_optimizer.step()
            if self.average:
                self.average.update_parameters(self.model)
            self.running.add(loss.detach(), correct(logits.detach(), batch.y))

    def end_epoch(self) -> None:
        """Validate, record, keep the weights if they are the best, and write it all down."""
        epoch, ratio = self.epoch + 1, self.ratio
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        record = {
            "epoch": epoch,
            "learning_rate": learning_rate,
            **({} if ratio is None else {"sparsity_ratio": ratio}),
            **self.running.means(),
            **validate(self.judged, self.training, self.val, self.batches.seed, self.fabric),
        }
        if not math.isfinite(record["loss"]):
            raise UserError(
                f"training diverged in epoch {epoch}: the loss is {record['loss']}; expected a"
                f" finite number. Try a smaller optimizer.lr (it is {learning_rate:g})"
            )
        self.history.append(record)
        if warning := self.training.warning(self.history):
            log.warning("%s", warning)
            record["warning"] = warning
        rivals = [each for each in self.history if each.get("sparsity_ratio") == self.final_ratio]
        if record in rivals and _score(record) >= max(map(_score, rivals)):
            self.best, self.best_epoch = weights_of(self.judged), epoch

        self.schedule.step()
        self.epoch, self.step = epoch, 0
        self.running = _Running.zero(self.fabric.device)
        self.checkpoint()

    def outcome(self) -> Fitted:
        return Fitted(self.best, self.best_epoch, weights_of(self.judged), self.final_ratio, self.history)


def _average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """An exponential moving average of ``model``, BatchNorm's buffers included."""
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


@torch.no_grad()
def validate(model: nn.Module, training: Training, val: Split, seed: int, fabric: Fabric) -> EpochRecord:
    """Accuracy on the held-out images, and robust accuracy under the method's own attack if any."""
    model.eval()
    clean = torch.zeros((), device=fabric.device)
    robust: Tensor | None = None
    for batch in val.batches(training.batch_size, key(seed, "validate")):
        with fabric.autocast():
            right = correct(model(batch.x), batch.y)
            survives = training.robustly_correct(model, batch)
        clean += right.sum()
        if survives is not None:
            robust = (0 if robust is None else robust) + (right & survives).sum()
    measured: EpochRecord = {"val_accuracy": clean.item() / len(val)}
    if robust is not None:
        measured["val_robust_accuracy"] = robust.item() / len(val)
    return measured


def _score(record: EpochRecord) -> float:
    name = "val_robust_accuracy" if "val_robust_accuracy" in record else "val_accuracy"
    return float(record[name])


def _show(progress: Progress, running: _Running, epoch: int, epochs: int, seconds: float) -> None:
    progress.show(
        epoch=f"{epoch + 1}/{epochs}",
        loss=f"{running.loss.item() / running.judged:.3f}",
        accuracy=f"{running.correct.item() / running.judged:.1%}",
        speed=f"{running.images / seconds:,.0f} images/s",
    )
