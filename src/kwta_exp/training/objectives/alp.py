"""Adversarial logit pairing: the logits of attacked images are pulled towards those of clean images.

Kannan, Kurakin and Goodfellow, "Adversarial Logit Pairing", arXiv 1803.06373, section 4.2:
min_theta E[L(theta, x', y) + lambda * |f(x) - f(x')|^2 / K].
"""

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, dataclasses
from torch import Tensor, nn

from kwta_exp.data.batches import Batch
from kwta_exp.fields import STRICT
from kwta_exp.training.objectives.base import AdversarialTraining


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class ALPTraining(AdversarialTraining):
    """Trains on attacked images, with the squared distance of clean and attacked logits as a penalty.

    The attack sees the network in eval mode. Clean and attacked images then go through the network as
    one batch in train mode, so both share BatchNorm's statistics, and gradients pass through both. (The
    k-WTA study took the clean logits in eval mode and as constants. The paper's own loss L mixes in the
    cross-entropy of clean images; here, as in the study, it is that of attacked images alone.)

    Args:
        weight: lambda, on the mean over images and classes; 0.5 in the study and the paper.
    """

    weight: PositiveFloat = 0.5

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        x_adv = self.attacked(model, batch)
        logits, logits_adv = model(torch.cat([batch.x, x_adv])).chunk(2)
        pairing = F.mse_loss(logits_adv, logits)
        return self.cross_entropy(logits_adv, batch.y) + self.weight * pairing, logits_adv
