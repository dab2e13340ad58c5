"""Projected gradient descent, and with one full step FGSM.

Madry, Makelov, Schmidt, Tsipras and Vladu, "Towards Deep Learning Models Resistant to Adversarial
Attacks", ICLR 2018, section 2.1:  x <- Proj_{x + S}(x + alpha sgn(grad_x L)).
Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, dataclasses
from torch import Tensor, nn

from kwta_exp.attacks.losses import Loss, LossName, attack_loss, excess, targeted_loss, wrong_classes
from kwta_exp.attacks.threat import Threat
from kwta_exp.attacks.together import Climb, Query, micro_batched, together
from kwta_exp.fields import STRICT, Eps, Norm
from kwta_exp.randomness import fold, normal


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class PGD:
    """Steps along the steepest direction of the loss, projected back after each.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        steps: gradient steps of each restart.
        step_size: length of a step; ``None`` takes ``relative_step_size * eps / steps``.
        relative_step_size: how far all steps together may lead, in radii; 2.5 is enough to reach and follow
            the boundary (Madry et al. 2018, section 5.3).
        random_start: begin at a uniform point of the ball instead of the image; ``"normal"`` begins at
            the image plus 0.001 times a standard normal draw, as TRADES does.
        restarts: independent runs; every one needs a random start of its own.
        momentum: step along ``g <- momentum * g + gradient / |gradient|_1`` (Dong et al., "Boosting
            Adversarial Attacks with Momentum", CVPR 2018, equation 6); 1 there, 0 for none.
        loss: ``"ce"``, ``"margin"``, ``"dlr"``, or ``"kl"``, the divergence from the prediction at the image.
        targets: run towards each of so many likeliest wrong classes, with the loss that raises that class;
            not for ``"kl"``. 0 for none.
        keep_best: return the iterate with the largest margin of error instead of the last, leave an image
            alone once it is fooled, and spend one more forward pass. Off for training, as is usual.
    """

    norm: Norm
    eps: Eps
    steps: PositiveInt = 40
    step_size: Eps | None = None
    relative_step_size: PositiveFloat = 2.5
    random_start: bool | Literal["normal"] = True
    restarts: PositiveInt = 1
    momentum: NonNegativeFloat = 0.0
    loss: LossName = "ce"
    targets: NonNegativeInt = 0
    keep_best: bool = True

    def __post_init__(self) -> None:
        if self.restarts > 1 and not (self.random_start and self.keep_best):
            raise ValueError(f"restarts={self.restarts} needs random_start=true and keep_best=true")
        if self.targets and (self.loss == "kl" or not self.keep_best):
            raise ValueError(f"targets={self.targets} needs keep_best=true and a loss other than kl")

    refills: ClassVar = True

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        losses = self._losses(micro_batched(model, max_batch_size), x, y)
        best = Best(x, y)
        for run in range(len(losses) * self.restarts):
            climb = partial(self._climb, x, keys, losses[run % len(losses)], run, best)
            together(model, climb, best.standing, max_batch_size)
        return best.x

    def _climb(self, x: Tensor, keys: Tensor, loss: Loss, run: int, best: "Best", at: Tensor) -> Climb:
        """One run on the images at positions ``at``."""
        threat = Threat(norm=self.norm, eps=self.eps)
        step_size = self.step_size
        if step_size is None:
            step_size = self.relative_step_size * self.eps / self.steps
        origin = x[at]
        x_adv = self._start(threat, origin, fold(run, keys[at]))
        velocity = torch.zeros_like(x_adv)
        for _ in range(self.steps):
            gradient, logits, _ = yield Query(x_adv, partial(loss, at=at))
            if self.keep_best and not (go_on := best.update(x_adv, logits, at)).all():
                at, origin, x_adv, gradient, velocity = (
                    each[go_on] for each in (at, origin, x_adv, gradient, velocity)
                )
                if not len(at):
                    return
            if self.momentum:
                scale = gradient.abs().mean(tuple(range(1, x.dim())), keepdim=True)
                velocity = self.momentum * velocity + gradient / scale.clamp_min(1e-30)
                gradient = velocity
            x_adv = threat.project(x_adv + step_size * threat.steepest(gradient), origin)

        if self.keep_best:
            _, logits, _ = yield Query(x_adv)
            best.update(x_adv, logits, at)
        else:
            best.x[at] = x_adv

    def _start(self, threat: Threat, x: Tensor, keys: Tensor) -> Tensor:
        if self.random_start == "normal":
            return threat.project(x + 0.001 * normal(keys, x.shape[1:]), x)
        return threat.random_point(x, keys) if self.random_start else x

    def passes(self, classes: int) -> tuple[int, int]:
        """The most passes, forward and backward, for one image."""
        runs = self.restarts * (min(self.targets, classes - 1) or 1)
        asked_once = self.loss == "kl" or self.targets > 0
        return runs * (self.steps + self.keep_best) + asked_once, runs * self.steps

    def _losses(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> list[Loss]:
        """What is raised, one for each target if there are any."""
        if not self.targets:
            return [attack_loss(self.loss, model, x, y)]
        ranking = wrong_classes(model, x, y)
        return [targeted_loss(self.loss, y, target) for target in ranking.T[: self.targets]]


class Best:
    """The iterate of each image with the largest margin of error so far.

    Ranked by margin whatever the loss: cross-entropy rounds to 0 on confident networks, where
    iterates could no longer be told apart.

    Args:
        x: the images.
        y: their labels.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.origin = x
        self.x = x.clone()
        self.margin = x.new_full((len(x),), float("-inf"))
        self._y = y
        self._successes = torch.zeros_like(y)

    @property
    def standing(self) -> Tensor:
        """The positions of images that no iterate fooled."""
        return (self._successes == 0).nonzero()[:, 0]

    def update(self, x_adv: Tensor, logits: Tensor, at: Tensor) -> Tensor:
        """Take over what is better.

        Args:
            x_adv: iterates ``(n, C, H, W)``.
            logits: theirs.
            at: the positions ``(n,)`` of their images.

        Returns:
            Which of them to go on with, bool ``(n,)``: an image is left alone after a success that no
            rounding undoes, by 5% of the range of its logits, or else after the second success.
        """
        y = self._y[at]
        found = excess(logits, y).to(self.margin)
        better = found > self.margin[at]
        self.x[at[better]] = x_adv[better]
        self.margin[at[better]] = found[better]
        self._successes[at] += found > 0
        settled = found > _SETTLED * (logits.amax(1) - logits.amin(1))
        return (self._successes[at] < 2) & ~settled


_SETTLED = 0.05
