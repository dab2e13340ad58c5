"""Auto-PGD: projected gradient descent that sets its own step size.

Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks", ICML 2020, algorithm 1, and the DLR losses of its section 4.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt, dataclasses
from torch import Tensor, nn

from kwta_exp.attacks.losses import Loss, LossName, attack_loss, targeted_dlr, wrong_classes
from kwta_exp.attacks.pgd import Best
from kwta_exp.attacks.standing import Try, best_of
from kwta_exp.attacks.threat import Threat
from kwta_exp.attacks.together import Climb, Query, micro_batched, together
from kwta_exp.fields import STRICT, Eps, Norm, Share
from kwta_exp.randomness import fold


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class APGD:
    """Momentum steps that start at 2 eps and are halved wherever progress stalls, back at the best point.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        steps: gradient steps of each run.
        restarts: runs from random points of the ball (for each target, if there are targets).
        loss: ``"ce"``, ``"dlr"``, ``"margin"`` or ``"kl"``.
        targets: run once towards each of so many likeliest wrong classes with the targeted DLR loss, instead
            of ``loss``; 9 in AutoAttack. 0 for none.
        rho: the share of steps since the last check that must have raised the loss, 0.75 in the paper.

    Of each image the iterate with the largest margin of error is kept; an image that is fooled is not
    run again.
    """

    norm: Norm
    eps: Eps
    steps: PositiveInt = 100
    restarts: PositiveInt = 1
    loss: LossName = "ce"
    targets: NonNegativeInt = 0
    rho: Share = 0.75

    refills: ClassVar = True

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        return best_of(
            self._tries(model, x, y, keys, max_batch_size), micro_batched(model, max_batch_size), x, y
        )

    def _tries(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None
    ) -> Iterator[Try]:
        threat = Threat(norm=self.norm, eps=self.eps)
        asked = micro_batched(model, max_batch_size)
        ranking = wrong_classes(asked, x, y) if self.targets else None
        if ranking is not None and ranking.shape[1] < 3:
            raise ValueError(
                f"targets={self.targets}: the targeted DLR loss needs 4 classes or more,"
                f" not {ranking.shape[1] + 1}"
            )

        def run(number: int, target: int | None) -> Try:
            def attempt(at: Tensor) -> Tensor:
                start = threat.random_point(x[at], fold(number, keys[at]))
                if ranking is None or target is None:
                    loss = attack_loss(self.loss, asked, x[at], y[at])
                else:
                    loss = targeted_dlr(y[at], ranking[at, target])
                best = Best(x[at], y[at])
                climb = partial(ascend, start, best, loss, threat, self.steps, self.rho)
                together(model, climb, best.standing, max_batch_size)
                return best.x

            return attempt

        wanted = range(min(self.targets, ranking.shape[1])) if ranking is not None else [None]
        number = 0
        for target in wanted:
            for _ in range(self.restarts):
                yield run(number, target)
                number += 1

    def passes(self, classes: int) -> tuple[int, int]:
        """The most passes, forward and backward, for one image."""
        runs = self.restarts * (min(self.targets, classes - 1) or 1)
        each = self.steps + 1
        return runs * (each + 1 + (self.loss == "kl")) + (self.targets > 0), runs * each


def ascend(start: Tensor, best: Best, loss: Loss, threat: Threat, steps: int, rho: float, at: Tensor) -> Climb:
    """One run of Auto-PGD on the images of ``best`` at the positions ``at``, from those of ``start``."""
    x, start = best.origin[at], start[at]
    gradient, logits, value = yield Query(start, partial(loss, at=at))
    best.update(start, logits, at)
    now = _State(
        at=at, x=x, x_adv=start, previous=start, gradient=gradient, value=value,
        top_x=start.clone(), top_gradient=gradient.clone(), top_value=value.clone(), top_at_check=value.clone(),
        rises=torch.zeros_like(value), just_halved=torch.ones_like(value, dtype=torch.bool),
        step_size=x.new_full((len(x), *[1] * (x.dim() - 1)), 2 * threat.eps),
    )  # fmt: skip
    interval, least, shorter = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    since_check = 0

    for step in range(steps):
        inertia = now.x_adv - now.previous
        ahead = threat.project(now.x_adv + now.step_size * threat.steepest(now.gradient), now.x)
        if step:
            ahead = threat.project(now.x_adv + 0.75 * (ahead - now.x_adv) + 0.25 * inertia, now.x)
        now.previous, now.x_adv, last_value = now.x_adv, ahead, now.value

        now.gradient, logits, now.value = yield Query(now.x_adv, partial(loss, at=now.at))
        now.rises += now.value > last_value
        better = now.value > now.top_value
        now.top_x[better], now.top_gradient[better] = now.x_adv[better], now.gradient[better]
        now.top_value = torch.where(better, now.value, now.top_value)
        if not (go_on := best.update(now.x_adv, logits, now.at)).all():
            now = now.only(go_on)
            if not len(now.at):
                break

        since_check += 1
        if since_check == interval:
            stalled = now.rises <= rho * interval
            stalled |= ~now.just_halved & (now.top_at_check >= now.top_value)
            now.just_halved, now.top_at_check = stalled, now.top_value.clone()
            now.step_size[stalled] /= 2
            now.x_adv, now.gradient = now.x_adv.clone(), now.gradient.clone()
            now.x_adv[stalled], now.gradient[stalled] = now.top_x[stalled], now.top_gradient[stalled]
            interval, since_check = max(interval - shorter, least), 0
            now.rises = torch.zeros_like(now.value)


@dataclass
class _State:
    """Of each image that is still attacked: its position, itself, and where its run is."""

    at: Tensor
    x: Tensor
    x_adv: Tensor
    previous: Tensor
    gradient: Tensor
    value: Tensor
    top_x: Tensor
    top_gradient: Tensor
    top_value: Tensor
    top_at_check: Tensor
    rises: Tensor
    just_halved: Tensor
    step_size: Tensor

    def only(self, which: Tensor) -> "_State":
        """The images of ``which``, bool ``(n,)``."""
        return _State(**{name: each[which] for name, each in vars(self).items()})
