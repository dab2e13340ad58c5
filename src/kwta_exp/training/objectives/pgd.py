"""Adversarial training: the cross-entropy of attacked images.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
equation 2.1:  min_theta E[max_{delta in S} L(theta, x + delta, y)].
"""

import torch.nn.functional as F
from pydantic import dataclasses
from torch import Tensor, nn

from kwta_exp.attacks import Attack
from kwta_exp.data.batches import Batch
from kwta_exp.fields import STRICT
from kwta_exp.training.objectives.base import Training, correct, eval_mode, unwrapped


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class PGDTraining(Training):
    """Trains on the images that ``attack`` makes of each batch, and on those alone.

    The attack sees the network in eval mode, as in the k-WTA study; the training step that follows
    runs in train mode, so BatchNorm's statistics are those of attacked images.

    Args:
        attack: the inner maximiser, with its own norm, eps and steps. Any object of this project's
            attack interface will do.
    """

    attack: Attack

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        network = unwrapped(model)
        with eval_mode(network):
            x_adv = self.attack(network, batch.x, batch.y, batch.keys)
        logits = model(x_adv)
        return F.cross_entropy(logits, batch.y), logits

    def robustly_correct(self, model: nn.Module, batch: Batch) -> Tensor:
        x_adv = self.attack(unwrapped(model), batch.x, batch.y, batch.keys)
        return correct(model(x_adv), batch.y)
