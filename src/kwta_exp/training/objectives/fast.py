"""Fast adversarial training: one large step from a random start, and a check for catastrophic overfitting.

Wong, Rice and Kolter, "Fast is better than free: Revisiting adversarial training", ICLR 2020,
algorithm 3 (FGSM-RS: a uniform start, one step of 1.25 eps, clipped to the ball) and section 5.4
(catastrophic overfitting: accuracy against PGD falls to nearly zero within an epoch while that against
FGSM keeps rising).
"""

from collections.abc import Mapping, Sequence

from pydantic import SkipValidation, dataclasses
from torch import Tensor, nn

from kwta_exp.attacks import Attack
from kwta_exp.data.batches import Batch
from kwta_exp.fields import STRICT, Share
from kwta_exp.training.objectives.base import AdversarialTraining, correct_under_attack


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class FastTraining(AdversarialTraining):
    """Trains on the images of a one-step ``attack`` and validates with a stronger one.

    The attack sees the network in eval mode; the step that follows runs in train mode, so BatchNorm's
    statistics are those of attacked images.

    Args:
        attack: the one-step attack on training images.
        probe: the iterative attack on validation images. It chooses the best epoch, so an epoch before the
            collapse is kept.
        collapse: an epoch is reported as catastrophic overfitting if accuracy under ``probe`` falls below
            this share of the best so far while the training accuracy (under ``attack``) does not fall by
            as much. One half is this project's convention.
    """

    probe: SkipValidation[Attack]
    collapse: Share = 0.5

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(self.attacked(model, batch))
        return self.cross_entropy(logits, batch.y), logits

    def robustly_correct(self, model: nn.Module, batch: Batch) -> Tensor:
        return correct_under_attack(self.probe, model, batch, self.search)

    def warning(self, history: Sequence[Mapping[str, float]]) -> str | None:
        last = history[-1]
        best = max(history, key=lambda record: record["val_robust_accuracy"])
        fallen = last["val_robust_accuracy"] < self.collapse * best["val_robust_accuracy"]
        if not fallen or last["accuracy"] < self.collapse * best["accuracy"]:
            return None
        return (
            f"catastrophic overfitting in epoch {last['epoch']:.0f}: validation accuracy under the probe is"
            f" {last['val_robust_accuracy']:.1%} ({best['val_robust_accuracy']:.1%} in epoch"
            f" {best['epoch']:.0f}), training accuracy under the one-step attack {last['accuracy']:.1%}"
        )
