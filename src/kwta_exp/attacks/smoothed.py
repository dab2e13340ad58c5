"""PGD on gradients averaged over noise around the iterate.

Expectation over transformation (Athalye, Engstrom, Ilyas and Kwok, "Synthesizing Robust Adversarial
Examples", ICML 2018) with Gaussian noise as the transformation: the gradient of the smoothed loss
E[L(x + s u)]. It sees a little past jumps of the network, where the gradient at one point sees none.
"""

from functools import partial

import torch
from pydantic import PositiveFloat, PositiveInt, dataclasses
from torch import Tensor, nn

from kwta_exp.attacks.losses import LossName, attack_loss
from kwta_exp.attacks.pgd import Best
from kwta_exp.attacks.threat import Threat
from kwta_exp.attacks.together import input_gradient
from kwta_exp.fields import STRICT, Eps, Norm
from kwta_exp.randomness import fold, normal


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class SmoothedPGD:
    """Steps along the mean gradient at ``samples`` noisy copies of the iterate; random start.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        steps: gradient steps.
        samples: noisy copies of each image at each step.
        sigma: standard deviation of the noise as a share of ``eps``. The copies may leave [0, 1].
        relative_step_size: how far all steps together may lead, in radii.
        loss: ``"ce"``, ``"dlr"``, ``"margin"`` or ``"kl"``.
    """

    norm: Norm
    eps: Eps
    steps: PositiveInt = 40
    samples: PositiveInt = 20
    sigma: PositiveFloat = 0.5
    relative_step_size: PositiveFloat = 2.5
    loss: LossName = "ce"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        threat = Threat(norm=self.norm, eps=self.eps)
        loss = attack_loss(self.loss, model, x, y)
        scale = self.sigma * (threat.eps if self.norm == "linf" else threat.eps / x.shape[1:].numel() ** 0.5)
        step_size = self.relative_step_size * self.eps / self.steps
        best = Best(x, y)
        at, origin, x_adv = best.standing, x, threat.random_point(x, fold(-1, keys))
        for step in range(self.steps):
            with torch.no_grad():
                go_on = best.update(x_adv, model(x_adv), at)
            at, origin, x_adv = at[go_on], origin[go_on], x_adv[go_on]
            if not len(at):
                return best.x
            total = torch.zeros_like(x_adv)
            for sample in range(self.samples):
                noise = normal(fold(step * self.samples + sample, keys[at]), x.shape[1:]).to(x)
                gradient, *_ = input_gradient(model, x_adv + scale * noise, partial(loss, at=at))
                total += gradient.nan_to_num(0.0)
            x_adv = threat.project(x_adv + step_size * threat.steepest(total), origin)
        with torch.no_grad():
            best.update(x_adv, model(x_adv), at)
        return best.x

    def passes(self, classes: int) -> tuple[int, int]:
        """The most passes, forward and backward, for one image."""
        return self.steps * (self.samples + 1) + 1 + (self.loss == "kl"), self.steps * self.samples
