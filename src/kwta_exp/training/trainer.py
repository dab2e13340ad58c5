"""The training loop: epochs, validation, checkpoints. A killed training resumes where it stopped."""

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kwta_exp.checkpoint import Weights, read_state, read_state_or_set_aside, save_state, weights_of
from kwta_exp.data.batches import Batch, Split, TrainingBatches
from kwta_exp.errors import UserError
from kwta_exp.failures import is_of_the_machine
from kwta_exp.interruption import saving
from kwta_exp.progress import Progress
from kwta_exp.randomness import key
from kwta_exp.training.objectives import Training
from kwta_exp.training.objectives.base import correct
from kwta_exp.training.shares import Shares, Sums
from kwta_exp.training.sparsity import Constant, Sparsity, set_ratio

log = logging.getLogger(__name__)

EpochRecord = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How to train a network.

    Args:
        method: the loss, its attack if it has one, and the number of epochs.
        optimizer: called with the parameters.
        lr_schedule: called with the optimizer; stepped once an epoch.
        sparsity: the sparsity ratio of each epoch.
    """

    method: Training
    optimizer: Callable[..., Optimizer]
    lr_schedule: Callable[..., LRScheduler]
    sparsity: Sparsity = field(default_factory=Constant)


@dataclass(frozen=True)
class Trained:
    """The weights of the best and of the last epoch, and a record of each epoch."""

    best: Weights
    best_epoch: int
    last: Weights
    history: list[EpochRecord]


class Trainer:
    """Trains a network, validates it after each epoch, and keeps the weights of the best epoch.

    The best epoch is the one of the highest robust validation accuracy where the method has an attack (the
    last epochs of adversarial training are often not the most robust: Rice, Wong and Kolter, "Overfitting in
    adversarially robust deep learning", ICML 2020), and of the highest accuracy otherwise; of equal epochs
    the later one. Where the sparsity ratio has a schedule, only epochs at its last ratio compete.

    Args:
        model: the network, on any device; it is trained in place.
        recipe: how to train it.
        batches: the training images.
        val: the validation images.
        fabric: device and precision.
        compiled: train a copy of ``model`` through ``torch.compile``, inner attacks included.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        batches: TrainingBatches,
        val: Split,
        fabric: Fabric,
        compiled: bool = False,
    ) -> None:
        if compiled:
            model = copy.deepcopy(model)
            model.compile()
        self.model, self.method, self.sparsity = model, recipe.method, recipe.sparsity
        self.batches, self.val, self.fabric, self.shares = batches, val, fabric, Shares(fabric)
        self.optimizer = recipe.optimizer(model.parameters())
        self.lr_schedule = recipe.lr_schedule(self.optimizer)
        self._wrapped_model, self._wrapped_optimizer = fabric.setup(model, self.optimizer)
        self.average: AveragedModel | None = None
        if (decay := self.method.ema_decay) is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

        self.epoch = self.step = 0
        self.memory: dict[str, Tensor] = {}
        self.sums = Sums.zero(fabric.device)
        self.history: list[EpochRecord] = []
        self.best: Weights = {}
        self.best_epoch = 0

    def train(
        self, state_path: Path, on_epoch: Callable[[list[EpochRecord]], None], checkpoint_seconds: float = 300.0
    ) -> Trained:
        """Train to the last epoch, from the state in ``state_path`` if there is one.

        The state is saved after each epoch and, within long epochs, every ``checkpoint_seconds``. Random
        numbers are a function of (seed, epoch, step, image), so a resumed training equals an uninterrupted
        one: bit for bit on a CPU with the same number of threads.

        Args:
            state_path: the file of the training state.
            on_epoch: called with the records so far, after each epoch and after resuming.
            checkpoint_seconds: the most work, in seconds, that is lost if the process is killed.

        Raises:
            UserError: if the loss is not finite, or the state is of another training.
        """
        if self._resume(state_path):
            on_epoch(self.history)
        total, done = self.method.epochs * len(self.batches), self.epoch * len(self.batches) + self.step

        def save() -> None:
            state = self.state_dict()
            if self.shares.is_first:
                save_state(state_path, state)

        with Progress("training", total, "step", start=done) as progress, saving(save) as leave_if_asked:
            while self.epoch < self.method.epochs:
                self._start_epoch()
                step_start = last_saved = time.monotonic()
                for batch in self.batches.epoch(self.epoch, start=self.step):
                    self._train_on(batch)
                    now = time.monotonic()
                    self.sums.seconds += now - step_start
                    step_start = now

                    progress.advance()
                    if progress.due:
                        self._show(progress)
                    due = now - last_saved > checkpoint_seconds
                    if self.shares.agreed_at(self.step, due) and self.step < len(self.batches):
                        save()
                        step_start = last_saved = time.monotonic()
                    if self.step < len(self.batches):
                        leave_if_asked()
                self._end_epoch()
                save()
                on_epoch(self.history)
                leave_if_asked()

        return Trained(self.best, self.best_epoch, weights_of(self.eval_model), self.history)

    def state_dict(self) -> dict[str, Any]:
        """All that changes during training, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "average": self.average and self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_schedule": self.lr_schedule.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "memory": self.shares.whole(self.memory),
            "sums": vars(self.sums.of_all(self.shares)),
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, on any device."""
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_schedule.load_state_dict(state["lr_schedule"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.memory = self.shares.own(self.fabric.to_device(state["memory"]))
        self.sums = Sums(**self.fabric.to_device(state["sums"])).of_rank(self.shares)
        self.history, self.best, self.best_epoch = state["history"], state["best"], state["best_epoch"]

    @property
    def eval_model(self) -> nn.Module:
        """The network that is validated and kept: the moving average if there is one."""
        return self.average.module if self.average else self.model

    def _resume(self, state_path: Path) -> bool:
        """Load the state in ``state_path``, if it is there and intact."""
        state = read_state_or_set_aside(state_path) if self.shares.is_first else None
        if not self.shares.agreed(state is not None):
            return False
        if not self.shares.is_first:
            state = read_state(state_path)
        if state is None:
            return False
        try:
            self.load_state_dict(state)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if is_of_the_machine(error):
                raise
            raise UserError(
                f"training state {state_path}: not of this training ({type(error).__name__}: {error});"
                " delete it, or use rerun=true"
            ) from error
        log.info("resuming at epoch %d, step %d", self.epoch + 1, self.step)
        return True

    def _ratio(self, epoch: int) -> float | None:
        return self.sparsity.ratio(epoch, self.method.epochs)

    def _start_epoch(self) -> None:
        ratio = self._ratio(self.epoch)
        if ratio is not None:
            set_ratio(self.model, ratio)
            set_ratio(self.eval_model, ratio)
        self._wrapped_model.train()

    def _train_on(self, batch: Batch) -> None:
        """Take the optimizer steps that the method takes on ``batch``."""
        # Dropout and the like draw from torch's global generator.
        rank = (self.shares.rank,) if self.shares.rank else ()
        torch.manual_seed(key(self.batches.seed, "step", self.epoch, self.step, *rank))
        n = len(batch.y)
        batch, weight = self.shares.of_batch(batch)
        losses = self.method.losses(self._wrapped_model, batch, self.memory)
        while True:
            with self.fabric.autocast():
                loss_and_logits = next(losses, None)
            if loss_and_logits is None:
                break
            self._optimizer_step(*loss_and_logits, batch.y, weight)
        self.sums.images += n
        self.step += 1

    def _optimizer_step(self, loss: Tensor, logits_NK: Tensor, y_N: Tensor, weight: float) -> None:
        self._wrapped_optimizer.zero_grad()
        self.fabric.backward(loss if weight == 1 else loss * weight)
        if self.method.clip_norm is not None:
            self.fabric.clip_gradients(
                self._wrapped_model,
                self._wrapped_optimizer,
                max_norm=self.method.clip_norm,
                error_if_nonfinite=False,  # _end_epoch raises a clearer error
            )
        self._wrapped_optimizer.step()
        self.shares.average_statistics(self.model)
        if self.average:
            self.average.update_parameters(self.model)
        if weight:
            self.sums.add(loss.detach(), correct(logits_NK.detach(), y_N))

    def _end_epoch(self) -> None:
        """Validate, record the epoch, and keep the weights if they are the best so far."""
        ratio, learning_rate = self._ratio(self.epoch), float(self.optimizer.param_groups[0]["lr"])
        record = {
            "epoch": self.epoch + 1,
            "learning_rate": learning_rate,
            **({} if ratio is None else {"sparsity_ratio": ratio}),
            **self.sums.of_all(self.shares).means(),
            **self.validate(),
        }
        if not math.isfinite(record["loss"]):
            raise UserError(
                f"training diverged in epoch {record['epoch']}: the loss is {record['loss']}; expected a"
                f" finite number. Try a smaller optimizer.lr (it is {learning_rate:g})"
            )
        self.history.append(record)
        if warning := self.method.warning(self.history):
            log.warning("%s", warning)
            record["warning"] = warning
        final_ratio = self._ratio(self.method.epochs - 1)
        candidates = [each for each in self.history if each.get("sparsity_ratio") == final_ratio]
        if ratio == final_ratio and _score(record) == max(map(_score, candidates)):
            self.best, self.best_epoch = weights_of(self.eval_model), record["epoch"]

        self.lr_schedule.step()
        self.epoch, self.step = self.epoch + 1, 0
        self.sums = Sums.zero(self.fabric.device)

    @torch.no_grad()
    def validate(self) -> EpochRecord:
        """Accuracy on the validation images, and robust accuracy under the method's attack if it has one."""
        self.eval_model.eval()
        # Correct ones, those that an attack leaves correct, and batches that were attacked.
        counts = torch.zeros(3, device=self.fabric.device)
        batches = self.val.batches(self.method.batch_size, key(self.batches.seed, "validate"))
        for number, batch in enumerate(batches):
            if not self.shares.has(number):
                continue
            with self.fabric.autocast():
                clean_correct = correct(self.eval_model(batch.x), batch.y)
                robust = self.method.robustly_correct(self.eval_model, batch)
            counts[0] += clean_correct.sum()
            if robust is not None:
                counts[1] += (clean_correct & robust).sum()
                counts[2] += 1
        n_correct, n_robust, attacked = self.shares.total(counts).tolist()
        measured: EpochRecord = {"val_accuracy": n_correct / len(self.val)}
        if attacked:
            measured["val_robust_accuracy"] = n_robust / len(self.val)
        return measured

    def _show(self, progress: Progress) -> None:
        means = self.sums.means()
        progress.show(
            epoch=f"{self.epoch + 1}/{self.method.epochs}",
            loss=f"{means['loss']:.3f}",
            accuracy=f"{means['accuracy']:.1%}",
            speed=f"{means['images_per_second']:,.0f} images/s",
        )


def _score(record: EpochRecord) -> float:
    name = "val_robust_accuracy" if "val_robust_accuracy" in record else "val_accuracy"
    return float(record[name])
