"""TRADES: natural error plus the distance between clean and attacked predictions.

Zhang, Yu, Jiao, Xing, El Ghaoui and Jordan, "Theoretically Principled Trade-off between Robustness
and Accuracy", ICML 2019, equation 5:
min_theta E[CE(f(x), y) + beta * max_{x' in S(x)} KL(p(x) || p(x'))].
"""

import torch.nn.functional as F
from pydantic import PositiveFloat, dataclasses
from torch import Tensor, nn

from kwta_exp.data.batches import Batch
from kwta_exp.fields import STRICT
from kwta_exp.training.objectives.base import AdversarialTraining


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class TRADESTraining(AdversarialTraining):
    """Trains on clean images and on images attacked away from the clean prediction.

    The attack sees the network in eval mode. Its loss should be ``"kl"``, and its start ``"normal"``, the
    small step off the image that the authors' code takes because the KL's gradient vanishes there. The two
    forward passes of the step run in train mode, the clean images first, each with its own batch
    statistics; BatchNorm's running ones see both. Gradients pass through both predictions.

    Args:
        beta: weight of the KL divergence; the k-WTA study and the paper's CIFAR-10 results use 6.
    """

    beta: PositiveFloat = 6.0

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        x_adv = self.attacked(model, batch)
        logits, logits_adv = model(batch.x), model(x_adv)
        divergence = F.kl_div(
            logits_adv.log_softmax(1), logits.log_softmax(1), log_target=True, reduction="batchmean"
        )
        return self.cross_entropy(logits, batch.y) + self.beta * divergence, logits
