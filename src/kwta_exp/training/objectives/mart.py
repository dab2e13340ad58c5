"""MART: a margin loss on attacked images, and a KL term weighted towards misclassified images.

Wang, Zou, Yi, Bailey, Ma and Gu, "Improving Adversarial Robustness Requires Revisiting Misclassified
Examples", ICLR 2020, equations 11 to 13:
min_theta E[BCE(p(x'), y) + lambda * KL(p(x) || p(x')) * (1 - p_y(x))]  with
BCE(p', y) = -log p'_y - log(1 - max_{k != y} p'_k).
"""

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, dataclasses
from torch import Tensor, nn

from kwta_exp.data.batches import Batch
from kwta_exp.fields import STRICT
from kwta_exp.training.objectives.base import AdversarialTraining

_HEADROOM = 1e-4
"""Added to ``1 - max p'`` (as in the authors' code), so that its logarithm stays finite."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class MARTTraining(AdversarialTraining):
    """Trains on attacked images with a margin term, and a KL term where the clean prediction is unsure.

    The attack sees the network in eval mode. The two forward passes run in train mode, clean images
    first, each with its own batch statistics; BatchNorm's running ones see both. Gradients pass through
    every term. Label smoothing applies to the first term of BCE.

    Args:
        weight: lambda; 5 in the paper.
    """

    weight: PositiveFloat = 5.0

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        x_adv = self.attacked(model, batch)
        logits, logits_adv = model(batch.x), model(x_adv)
        log_p, log_p_adv = logits.log_softmax(1), logits_adv.log_softmax(1)
        others = log_p_adv.exp().scatter(1, batch.y[:, None], 0)
        boosted = self.cross_entropy(logits_adv, batch.y) - torch.log(1 + _HEADROOM - others.amax(1)).mean()
        divergence_N = F.kl_div(log_p_adv, log_p, log_target=True, reduction="none").sum(1)
        doubt_N = 1 - log_p.gather(1, batch.y[:, None]).exp()[:, 0]
        return boosted + self.weight * (divergence_N * doubt_N).mean(), logits_adv
