"""Auto-PGD: projected gradient descent that sets its own step size.

Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks", ICML 2020, algorithm 1, and the DLR losses of its section 4.
"""

from collections.abc import Callable, Iterator

import torch
from pydantic import dataclasses
from torch import Tensor, nn

from kwta_exp.attacks.losses import LossName, attack_loss, targeted_dlr, wrong_classes
from kwta_exp.attacks.pgd import Best, input_gradient
from kwta_exp.attacks.standing import Try, best_of
from kwta_exp.attacks.threat import Threat
from kwta_exp.fields import STRICT, Count, Eps, Natural, Norm, Share
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
    steps: Count = 100
    restarts: Count = 1
    loss: LossName = "ce"
    targets: Natural = 0
    rho: Share = 0.75

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        return best_of(self._tries(model, x, y, keys), model, x, y)

    def _tries(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Iterator[Try]:
        threat = Threat(norm=self.norm, eps=self.eps)
        ranking = wrong_classes(model, x, y) if self.targets else None
        if ranking is not None and ranking.shape[1] < 3:
            raise ValueError(
                f"targets={self.targets}: the targeted DLR loss needs 4 classes or more,"
                f" not {ranking.shape[1] + 1}"
            )

        def run(number: int, target: int | None) -> Try:
            def attempt(at: Tensor) -> Tensor:
                start = threat.random_point(x[at], fold(number, keys[at]))
                if ranking is None or target is None:
                    loss = attack_loss(self.loss, model, x[at], y[at])
                else:
                    loss = targeted_dlr(y[at], ranking[at, target])
                return ascend(model, x[at], start, y[at], loss, threat, self.steps, self.rho)

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


def ascend(
    model: nn.Module,
    x: Tensor,
    start: Tensor,
    y: Tensor,
    loss: Callable[[Tensor], Tensor],
    threat: Threat,
    steps: int,
    rho: float,
) -> Tensor:
    """One run of Auto-PGD from ``start``; returns the iterates with the largest margin of error."""
    step_size = x.new_full((len(x), *[1] * (x.dim() - 1)), 2 * threat.eps)
    x_adv = previous = start
    kept = Best(x)

    gradient, logits, value = input_gradient(model, x_adv, loss)
    kept.update(x_adv, logits, y)
    top_x, top_gradient, top_value = x_adv.clone(), gradient.clone(), value.clone()

    interval, least, shorter = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    since_check = 0
    rises = torch.zeros_like(value)
    top_at_check, just_halved = top_value.clone(), torch.ones_like(value, dtype=torch.bool)

    for step in range(steps):
        inertia, previous = x_adv - previous, x_adv
        ahead = threat.project(x_adv + step_size * threat.steepest(gradient), x)
        if step:
            ahead = threat.project(x_adv + 0.75 * (ahead - x_adv) + 0.25 * inertia, x)
        x_adv, last_value = ahead, value

        gradient, logits, value = input_gradient(model, x_adv, loss)
        if kept.update(x_adv, logits, y):
            break
        rises += value > last_value
        better = value > top_value
        top_x[better], top_gradient[better] = x_adv[better], gradient[better]
        top_value = torch.where(better, value, top_value)

        since_check += 1
        if since_check == interval:
            stalled = rises <= rho * interval
            stalled |= ~just_halved & (top_at_check >= top_value)
            just_halved, top_at_check = stalled, top_value.clone()
            step_size[stalled] /= 2
            x_adv, gradient = x_adv.clone(), gradient.clone()
            x_adv[stalled], gradient[stalled] = top_x[stalled], top_gradient[stalled]
            interval, since_check, rises = max(interval - shorter, least), 0, torch.zeros_like(value)

    return kept.x
