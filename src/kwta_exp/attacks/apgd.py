"""Auto-PGD: projected gradient descent that sets its own step size.

Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks", ICML 2020, algorithm 1, and the DLR losses of its section 4.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt, dataclasses
from torch import Tensor, nn

from kwta_exp.attacks.base import Attack, MaxQueries, MicroBatches, remaining
from kwta_exp.attacks.losses import Loss, LossName, loss_and_labels, targeted
from kwta_exp.attacks.pgd import Best, for_each_image
from kwta_exp.fields import STRICT, Eps, Norm, Share
from kwta_exp.randomness import fold


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class APGD(Attack):
    """Momentum steps that start at 2 eps and are halved wherever progress stalls, back at the best point.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        steps: gradient steps of each run.
        restarts: runs from random points of the ball (for each target, if there are targets).
        loss: ``"ce"``, ``"dlr"``, ``"margin"`` or ``"kl"``.
        targets: run once towards each of this many likeliest wrong classes with the targeted DLR loss, instead
            of ``loss``; 9 in AutoAttack. 0 for none.
        rho: the share of steps since the last check that must have increased the loss, 0.75 in the paper.

    The iterate of each image with the largest margin is kept; an image that is fooled is dropped.
    """

    norm: Norm
    eps: Eps
    steps: PositiveInt = 100
    restarts: PositiveInt = 1
    loss: LossName = "ce"
    targets: NonNegativeInt = 0
    rho: Share = 0.75

    independent: ClassVar[bool] = True

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        batches, best = MicroBatches(model, max_batch_size), Best(x, y)
        run = 0
        for loss, labels in self._goals(batches, x, y):
            for _ in range(self.restarts):
                index = best.not_fooled
                if not len(index):
                    return best.x
                start = self.threat.random_point(x[index], fold(run, keys[index]))
                self._run(batches, best, index, start, loss, labels[index])
                run += 1
        return best.x

    def _goals(self, model: MicroBatches, x: Tensor, y: Tensor) -> list[tuple[Loss, Tensor]]:
        if not self.targets:
            return [loss_and_labels(self.loss, model.logits, x, y)]
        return targeted("dlr", model.logits, x, y, self.targets)

    def _run(
        self, model: MicroBatches, best: Best, index: Tensor, start: Tensor, loss: Loss, y: Tensor
    ) -> None:
        """One run from ``start`` on the images at positions ``index``; ``y`` is what the loss needs of them."""
        threat = self.threat
        gradient, logits, value = model.gradient(start, y, loss)
        keep = best.update(start, logits, index)
        now = _State(
            index=index, x=best.clean[index], y=y, x_adv=start, previous=start, gradient=gradient, value=value,
            top_x=start, top_gradient=gradient, top_value=value, value_at_check=value,
            rises=torch.zeros_like(value), just_halved=torch.ones_like(value, dtype=torch.bool),
            step_size=start.new_full((len(start), *[1] * (start.dim() - 1)), 2 * self.eps),
        ).only(remaining(0, keep))  # fmt: skip
        interval, least, shorter = (max(int(share * self.steps), 1) for share in (0.22, 0.06, 0.03))
        since_check = 0

        for step in range(1, self.steps + 1):
            if not len(now.index):
                return
            inertia = now.x_adv - now.previous
            ahead = threat.project(now.x_adv + now.step_size * threat.steepest(now.gradient), now.x)
            if step > 1:
                ahead = threat.project(now.x_adv + 0.75 * (ahead - now.x_adv) + 0.25 * inertia, now.x)
            now.previous, now.x_adv, last_value = now.x_adv, ahead, now.value

            now.gradient, logits, now.value = model.gradient(now.x_adv, now.y, loss)
            now.rises += now.value > last_value
            better = now.value > now.top_value
            now.top_x = _choose(better, now.x_adv, now.top_x)
            now.top_gradient = _choose(better, now.gradient, now.top_gradient)
            now.top_value = torch.where(better, now.value, now.top_value)
            keep = best.update(now.x_adv, logits, now.index)
            now = now.only(remaining(step, keep))

            since_check += 1
            if since_check == interval:
                stalled = now.rises <= self.rho * interval
                stalled |= ~now.just_halved & (now.value_at_check >= now.top_value)
                now.just_halved, now.value_at_check = stalled, now.top_value
                now.step_size = _choose(stalled, now.step_size / 2, now.step_size)
                now.x_adv = _choose(stalled, now.top_x, now.x_adv)
                now.gradient = _choose(stalled, now.top_gradient, now.gradient)
                interval, since_check = max(interval - shorter, least), 0
                now.rises = torch.zeros_like(now.value)

    def max_queries(self, classes: int) -> MaxQueries:
        """Every run takes all its steps; ``"kl"`` and targets need the logits of the clean image."""
        runs = self.restarts * (min(self.targets, classes - 1) or 1)
        clean = self.loss == "kl" or self.targets > 0
        return MaxQueries(runs * (self.steps + 1) + clean, runs * (self.steps + 1))


@dataclass
class _State:
    """A run in progress: one row for each image that is still attacked."""

    index: Tensor
    x: Tensor
    y: Tensor
    x_adv: Tensor
    previous: Tensor
    gradient: Tensor
    value: Tensor
    top_x: Tensor
    top_gradient: Tensor
    top_value: Tensor
    value_at_check: Tensor
    rises: Tensor
    just_halved: Tensor
    step_size: Tensor

    def only(self, rows: Tensor | None) -> "_State":
        """The images in these rows, int64; ``None`` for all."""
        if rows is None:
            return self
        return _State(**{name: each[rows] for name, each in vars(self).items()})


def _choose(which: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The images of ``first`` where ``which``, bool ``(n,)``, and of ``second`` elsewhere."""
    return torch.where(for_each_image(which, first), first, second)
