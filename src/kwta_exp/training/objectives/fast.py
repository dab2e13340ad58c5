"""Fast adversarial training: one large step from a random start, and a watch for its known failure.

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
from kwta_exp.training.objectives.base import AdversarialTraining, withstands


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class FastTraining(AdversarialTraining):
    """Trains on the images of a one-step ``attack``, judged by a stronger one.

    The attack sees the network in eval mode; the step that follows runs in train mode, so BatchNorm's
    statistics are those of attacked images.

    Args:
        attack: the one step.
        probe: the iterative attack that validation images are judged under. The best epoch is chosen by
            it, so the one before a collapse is kept.
        collapse: an epoch is reported as catastrophic overfitting if accuracy under ``probe`` falls below
            this share of the best so far while the training accuracy (under ``attack``) does not fall by
            as much. A half by convention of this project.
    """

    probe: SkipValidation[Attack]
    collapse: Share = 0.5

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(self.attacked(model, batch))
        return self.cross_entropy(logits, batch.y), logits

    def robustly_correct(self, model: nn.Module, batch: Batch) -> Tensor:
        return withstands(self.probe, model, batch, self.search)

    def warning(self, history: Sequence[Mapping[str, float]]) -> str | None:
        last = history[-1]
        best = max(history, key=lambda record: record["val_robust_accuracy"])
        fallen = last["val_robust_accuracy"] < self.collapse * best["val_robust_accuracy"]
        if not fallen or last["accuracy"] < self.collapse * best["accuracy"]:
            return None
        return (
            f"catastrophic overfitting in epoch {last['epoch']:.0f}: {last['val_robust_accuracy']:.1%} of the"
            f" validation images withstand the probe ({best['val_robust_accuracy']:.1%} in epoch"
            f" {best['epoch']:.0f}), while {last['accuracy']:.1%} of the training images withstand the one step"
        )
