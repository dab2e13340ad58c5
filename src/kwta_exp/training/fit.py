"""The training loop: epochs, validation, checkpoints; killed at any moment, it goes on where it was."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kwta_exp.checkpoint import Weights, read_state, save_state, weights_of
from kwta_exp.data.batches import Split, TrainingBatches
from kwta_exp.errors import UserError
from kwta_exp.progress import Progress
from kwta_exp.randomness import key
from kwta_exp.training.objectives import Training
from kwta_exp.training.objectives.base import correct

log = logging.getLogger(__name__)

EpochRecord = dict[str, float]

STATE = {"model", "optimizer", "schedule", "history", "best", "best_epoch", "epoch", "step", "running"}
"""What a training state holds."""


@dataclass(frozen=True)
class Fitted:
    """The outcome of training: weights of the best and of the last epoch, and every epoch's record."""

    best: Weights
    best_epoch: int
    last: Weights
    history: list[EpochRecord]


@dataclass
class _Running:
    """Sums over the batches of an epoch, kept on the device so that no step waits for them."""

    loss: Tensor
    correct: Tensor
    images: int
    seconds: float

    @classmethod
    def zero(cls, device: torch.device) -> "_Running":
        return cls(torch.zeros((), device=device), torch.zeros((), device=device), 0, 0.0)


def fit(
    model: nn.Module,
    training: Training,
    batches: TrainingBatches,
    val: Split,
    optimizer_factory: Callable[..., Optimizer],
    schedule_factory: Callable[..., LRScheduler],
    fabric: Fabric,
    state_path: Path,
    on_epoch: Callable[[list[EpochRecord]], None],
    checkpoint_seconds: float = 300.0,
) -> Fitted:
    """Train ``model`` and return its best and last weights.

    All state between two moments is in ``state_path``: written after each epoch and, inside long
    ones, every ``checkpoint_seconds``. Randomness is a function of (seed, epoch, step, image), so a
    resumed run is the uninterrupted one, bit for bit on a CPU with the same threads.

    Args:
        model: the network, on any device.
        training: the method (its loss, epochs).
        batches: what to learn from.
        val: images that choose the best epoch, by robust accuracy where the method has an attack and
            by accuracy where not; of equal epochs the later one.
        optimizer_factory: called with the parameters.
        schedule_factory: called with the optimizer; stepped once an epoch.
        fabric: device and precision.
        state_path: where the state lives.
        on_epoch: called after every epoch with the records of all so far.
        checkpoint_seconds: longest stretch of work that a kill may cost.

    Raises:
        UserError: if the loss stops being finite, or the state file is damaged.
    """
    optimizer = optimizer_factory(model.parameters())
    schedule = schedule_factory(optimizer)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    device = fabric.device

    history: list[EpochRecord] = []
    best: Weights = {}
    best_epoch = epoch = step = 0
    running = _Running.zero(device)

    if state_path.exists():
        state = read_state(state_path, expected=STATE)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        history, best, best_epoch = state["history"], state["best"], state["best_epoch"]
        epoch, step = state["epoch"], state["step"]
        running = _Running(
            **{
                **state["running"],
                "loss": state["running"]["loss"].to(device),
                "correct": state["running"]["correct"].to(device),
            }
        )
        log.info("continuing at epoch %d, step %d", epoch + 1, step)
        on_epoch(history)

    def checkpoint() -> None:
        save_state(
            state_path,
            {
                "model": weights_of(model),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "history": history,
                "best": best,
                "best_epoch": best_epoch,
                "epoch": epoch,
                "step": step,
                "running": vars(running),
            },
        )

    total = training.epochs * len(batches)
    with Progress("training", total, "step", start=epoch * len(batches) + step) as progress:
        while epoch < training.epochs:
            learning_rate = float(optimizer.param_groups[0]["lr"])
            saved = started = time.monotonic()

            wrapped.train()
            for batch in batches.epoch(epoch, start=step):
                # Dropout and the like draw from torch's own generator.
                torch.manual_seed(key(batches.seed, "step", epoch, step))
                with fabric.autocast():
                    loss, logits = training.loss(wrapped, batch)
                wrapped_optimizer.zero_grad()
                fabric.backward(loss)
                wrapped_optimizer.step()

                running.loss += loss.detach() * len(batch.y)
                running.correct += correct(logits.detach(), batch.y).sum()
                running.images += len(batch.y)
                step += 1
                progress.advance()
                now = time.monotonic()
                if progress.due:
                    _show(progress, running, epoch, training.epochs, running.seconds + now - started)
                if now - saved > checkpoint_seconds and step < len(batches):
                    running.seconds += now - started
                    checkpoint()
                    saved = started = time.monotonic()

            running.seconds += time.monotonic() - started
            record = {
                "epoch": epoch + 1,
                "learning_rate": learning_rate,
                "loss": running.loss.item() / running.images,
                "accuracy": running.correct.item() / running.images,
                "images_per_second": running.images / running.seconds,
                **validate(wrapped, training, val, batches.seed, fabric),
            }
            if not math.isfinite(record["loss"]):
                raise UserError(
                    f"training diverged in epoch {epoch + 1}: the loss is {record['loss']}; expected a"
                    f" finite number. Try a smaller optimizer.lr (it is {learning_rate:g})"
                )
            schedule.step()
            history.append(record)
            if _score(record) >= max(_score(earlier) for earlier in history):
                best, best_epoch = weights_of(model), epoch + 1
            epoch, step = epoch + 1, 0
            running = _Running.zero(device)
            checkpoint()
            on_epoch(history)

    return Fitted(best, best_epoch, weights_of(model), history)


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
    record = {"val_accuracy": clean.item() / len(val)}
    if robust is not None:
        record["val_robust_accuracy"] = robust.item() / len(val)
    return record


def _score(record: EpochRecord) -> float:
    return record.get("val_robust_accuracy", record["val_accuracy"])


def _show(progress: Progress, running: _Running, epoch: int, epochs: int, seconds: float) -> None:
    progress.show(
        epoch=f"{epoch + 1}/{epochs}",
        loss=f"{running.loss.item() / running.images:.3f}",
        accuracy=f"{running.correct.item() / running.images:.1%}",
        speed=f"{running.images / seconds:,.0f} images/s",
    )
