"""Free adversarial training: one backward pass feeds both the network and the perturbation.

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
from kwta_exp.training.objectives.base import Training, withstands


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class FreeTraining(Training):
    """Replays each batch ``replays`` times; each step's backward pass also moves the perturbation.

    The perturbation is carried from one batch to the next, as published (the k-WTA study's code starts
    each batch at zero), and survives a kill. Everything runs in train mode, perturbation included:
    BatchNorm sees attacked images.

    Args:
        epochs: passes over the images; each costs ``replays`` optimizer steps a batch, so the paper divides
            the usual number by it.
        replays: m; 8 in the paper's CIFAR-10 runs.
        norm: of the perturbation.
        eps: its radius, and the length of its steps.
        probe: the attack that validation images are judged under.
    """

    replays: PositiveInt = 8
    norm: Norm
    eps: Eps
    probe: SkipValidation[Attack]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """That of the first replay from no perturbation; :meth:`losses` is the method."""
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
        return withstands(self.probe, model, batch)
