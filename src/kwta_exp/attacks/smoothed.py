"""PGD on gradients averaged over noise around the iterate.

Expectation over transformation (Athalye, Engstrom, Ilyas and Kwok, "Synthesizing Robust Adversarial
Examples", ICML 2018) with Gaussian noise as the transformation: the gradient of the smoothed loss
E[L(x + s u)]. Averaging looks past the jumps of a discontinuous network, where a single gradient does not.
"""

from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt, dataclasses
from torch import Tensor, nn

from kwta_exp.attacks.base import Attack, MaxQueries, MicroBatches, compact
from kwta_exp.attacks.losses import LossName, loss_and_labels
from kwta_exp.attacks.pgd import Best
from kwta_exp.fields import STRICT, Eps, Norm
from kwta_exp.randomness import fold, normal


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class SmoothedPGD(Attack):
    """Steps along the mean gradient at ``samples`` noisy copies of the iterate; random start.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        steps: gradient steps.
        samples: noisy copies of each image at each step.
        sigma: standard deviation of the noise as a share of ``eps``. The copies may leave [0, 1].
        relative_step_size: total length of all steps, in radii.
        loss: ``"ce"``, ``"dlr"``, ``"margin"`` or ``"kl"``.
    """

    norm: Norm
    eps: Eps
    steps: PositiveInt = 40
    samples: PositiveInt = 20
    sigma: PositiveFloat = 0.5
    relative_step_size: PositiveFloat = 2.5
    loss: LossName = "ce"

    independent: ClassVar[bool] = True

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        batches, best, threat = MicroBatches(model, max_batch_size), Best(x, y), self.threat
        loss, labels = loss_and_labels(self.loss, batches.logits, x, y)
        sigma = self.sigma * (self.eps if self.norm == "linf" else self.eps / x.shape[1:].numel() ** 0.5)
        step_size = self.relative_step_size * self.eps / self.steps
        index, x_adv = best.not_fooled, threat.random_point(x, fold(-1, keys))
        for step in range(self.steps):
            keep = best.update(x_adv, batches.logits(x_adv), index)
            index, x, x_adv, labels, keys = compact(step, keep, index, x, x_adv, labels, keys)
            if not len(index):
                return best.x
            total = torch.zeros_like(x_adv)
            for sample in range(self.samples):
                noise = normal(fold(step * self.samples + sample, keys), x.shape[1:]).to(x)
                gradient, _, _ = batches.gradient(x_adv + sigma * noise, labels, loss)
                total += gradient.nan_to_num(0.0)
            x_adv = threat.project(x_adv + step_size * threat.steepest(total), x)
        best.update(x_adv, batches.logits(x_adv), index)
        return best.x

    def max_queries(self, classes: int) -> MaxQueries:
        """A look at every iterate, and ``samples`` gradients a step."""
        return MaxQueries(self.steps * (self.samples + 1) + 1 + (self.loss == "kl"), self.steps * self.samples)
