"""Free adversarial training: one backward pass updates both the network and the perturbation.

Shafahi, Najibi, Ghiasi, Xu, Dickerson, Studer, Davis, Taylor and Goldstein, "Adversarial Training for
Free!", NeurIPS 2019, algorithm 1.
"""

from collections.abc import Iterator

import torch
from pydantic import PositiveInt, SkipValidation, dataclasses
from torch import Tensor, nn

from kwta_exp.attacks import Attack, Threat
from kwta_exp.data.batches import Batch
from kwta_exp.fields import STRICT, Eps, Norm
from kwta_exp.training.objectives.base import Training, correct_under_attack


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class FreeTraining(Training):
    """Replays each batch ``replays`` times; each step's backward pass also updates the perturbation.

    The perturbation is carried from one batch to the next, as published (the k-WTA study's code starts
    each batch at zero), and is part of the training state. Everything runs in train mode, the attack
    included: BatchNorm sees attacked images.

    Args:
        epochs: passes over the images; each takes ``replays`` optimizer steps a batch, so the paper divides
            the usual number of epochs by it.
        replays: m; 8 in the paper's CIFAR-10 runs.
        norm: the norm of the perturbation.
        eps: its radius and its step size.
        probe: the attack on validation images.
    """

    replays: PositiveInt = 8
    norm: Norm
    eps: Eps
    probe: SkipValidation[Attack]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of clean images; training calls :meth:`losses`."""
        logits = model(batch.x)
        return self.cross_entropy(logits, batch.y), logits

    def losses(
        self, model: nn.Module, batch: Batch, memory: dict[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        threat, x = Threat(norm=self.norm, eps=self.eps), batch.x
        carried = memory.get("delta", x[:0])[: len(x)]
        delta = torch.cat([carried, torch.zeros_like(x[len(carried) :])])  # the last batch may be larger
        for _ in range(self.replays):
            x_adv = threat.project(x + delta, x).requires_grad_()
            logits = model(x_adv)
            yield self.cross_entropy(logits, batch.y), logits
            gradient = x_adv.grad
            assert gradient is not None
            delta = threat.bound(delta + self.eps * threat.steepest(gradient))
        memory["delta"] = torch.cat([delta, memory["delta"][len(x) :]]) if "delta" in memory else delta

    def robustly_correct(self, model: nn.Module, batch: Batch) -> Tensor:
        return correct_under_attack(self.probe, model, batch)
