"""Adversarial training: the cross-entropy of attacked images.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
equation 2.1:  min_theta E[max_{delta in S} L(theta, x + delta, y)].
"""

from pydantic import dataclasses
from torch import Tensor, nn

from kwta_exp.data.batches import Batch
from kwta_exp.fields import STRICT
from kwta_exp.training.objectives.base import AdversarialTraining


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class PGDTraining(AdversarialTraining):
    """Trains on the adversarial images of each batch alone.

    The attack sees the network in eval mode; the step that follows runs in train mode, so BatchNorm's
    statistics are those of attacked images.
    """

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(self.attacked(model, batch))
        return self.cross_entropy(logits, batch.y), logits
