"""Projected gradient descent, and with one full step FGSM.

Madry, Makelov, Schmidt, Tsipras and Vladu, "Towards Deep Learning Models Resistant to Adversarial
Attacks", ICLR 2018, section 2.1:  x <- Proj_{x + S}(x + alpha sgn(grad_x L)).
Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.
"""

from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, dataclasses
from torch import Tensor, nn

from kwta_exp.attacks.base import Attack, MaxQueries, MicroBatches, compact
from kwta_exp.attacks.losses import Loss, LossName, loss_and_labels, ranking_margin, targeted
from kwta_exp.fields import STRICT, Eps, Norm
from kwta_exp.randomness import fold, normal


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class PGD(Attack):
    """Steps along the steepest direction of the loss, projected back after each.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        steps: gradient steps of each restart.
        step_size: length of a step; ``None`` takes ``relative_step_size * eps / steps``.
        relative_step_size: total length of all steps, in radii; 2.5 is enough to reach the boundary from any
            start and to move along it (Madry et al. 2018, section 5.3).
        random_start: begin at a uniform point of the ball instead of the image; ``"normal"`` begins at
            the image plus 0.001 times a standard normal draw, as TRADES does.
        restarts: independent runs, each with a random start of its own.
        momentum: step along ``g <- momentum * g + gradient / |gradient|_1`` (Dong et al., "Boosting
            Adversarial Attacks with Momentum", CVPR 2018, equation 6); 1 there, 0 for none.
        loss: ``"ce"``, ``"margin"``, ``"dlr"``, or ``"kl"``, the divergence from the prediction at the image.
        targets: run once towards each of this many likeliest wrong classes, with the targeted loss; not for
            ``"kl"``. 0 for none.
        keep_best: return the iterate with the largest margin instead of the last, drop an image once it is
            fooled, and spend one more forward pass. Off for training, as is usual.
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

    independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.restarts > 1 and not (self.random_start and self.keep_best):
            raise ValueError(f"restarts={self.restarts} needs random_start=true and keep_best=true")
        if self.targets and (self.loss == "kl" or not self.keep_best):
            raise ValueError(f"targets={self.targets} needs keep_best=true and a loss other than kl")

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        batches, best = MicroBatches(model, max_batch_size), Best(x, y)
        for run, (loss, labels) in enumerate(self._goals(batches, x, y) * self.restarts):
            index = best.not_fooled
            if not len(index):
                break
            start = self._start(x[index], fold(run, keys[index]))
            self._run(batches, best, index, start, loss, labels[index])
        return best.x

    def _run(
        self, model: MicroBatches, best: "Best", index: Tensor, x_adv: Tensor, loss: Loss, y: Tensor
    ) -> None:
        """One run from ``x_adv`` on the images at positions ``index``; ``y`` is what the loss needs of them."""
        threat, x, velocity = self.threat, best.clean[index], torch.zeros_like(x_adv)
        for step in range(self.steps):
            gradient, logits, _ = model.gradient(x_adv, y, loss)
            if self.keep_best:
                keep = best.update(x_adv, logits, index)
                index, x, x_adv, y, gradient, velocity = compact(
                    step, keep, index, x, x_adv, y, gradient, velocity
                )
                if not len(index):
                    return
            if self.momentum:
                gradient = velocity = self.momentum * velocity + normalised(gradient)
            x_adv = threat.project(x_adv + self.actual_step_size * threat.steepest(gradient), x)

        if self.keep_best:
            best.update(x_adv, model.logits(x_adv), index)
        else:
            best.x[index] = x_adv

    @property
    def actual_step_size(self) -> float:
        """``step_size``, or what ``None`` stands for."""
        return self.relative_step_size * self.eps / self.steps if self.step_size is None else self.step_size

    def _start(self, x: Tensor, keys: Tensor) -> Tensor:
        if self.random_start == "normal":
            return self.threat.project(x + 0.001 * normal(keys, x.shape[1:]), x)
        return self.threat.random_point(x, keys) if self.random_start else x

    def _goals(self, model: MicroBatches, x: Tensor, y: Tensor) -> list[tuple[Loss, Tensor]]:
        """The loss and labels of each run: one, or one for each target."""
        if self.targets:
            return targeted(self.loss, model.logits, x, y, self.targets)
        return [loss_and_labels(self.loss, model.logits, x, y)]

    def max_queries(self, classes: int) -> MaxQueries:
        """Every run takes all its steps; ``"kl"`` and targets need the logits of the clean image."""
        runs = self.restarts * (min(self.targets, classes - 1) or 1)
        clean = self.loss == "kl" or self.targets > 0
        return MaxQueries(runs * (self.steps + self.keep_best) + clean, runs * self.steps)


class Best:
    """The iterate of each image with the largest margin so far.

    Ranked by margin whatever the loss: cross-entropy rounds to 0 on confident networks, where
    iterates could no longer be told apart.

    Args:
        x: the clean images.
        y: their labels.

    Attributes:
        clean: the clean images.
        x: the best iterates.
        margin: their margins ``(N,)``.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.clean = x
        self.x = x.clone()
        self.margin = x.new_full((len(x),), float("-inf"))
        self._y = y
        self._successes = torch.zeros_like(y)
        self._done = torch.zeros_like(y, dtype=torch.bool)
        self._updated = False

    @property
    def not_fooled(self) -> Tensor:
        """The positions of the images that no iterate fooled, int64."""
        if not self._updated:
            return torch.arange(len(self._y), device=self._y.device)
        return (self._successes == 0).nonzero()[:, 0]

    def update(self, x_adv: Tensor, logits: Tensor, index: Tensor) -> Tensor:
        """Keep the iterates that are better than those so far.

        Nothing changes for an image that needs no more steps, so it does not matter how long it stays in the
        batch.

        Args:
            x_adv: iterates ``(n, C, H, W)``.
            logits: their logits.
            index: the positions ``(n,)`` of their images, all different.

        Returns:
            The images to go on with, bool ``(n,)``. One is done after a success that no rounding undoes (a
            margin of 5% of the range of its logits), or else after the second success.
        """
        found, going = ranking_margin(logits, self._y[index]).to(self.margin), ~self._done[index]
        before = self.margin[index]
        better = going & (found > before)
        self.x[index] = torch.where(for_each_image(better, x_adv), x_adv, self.x[index])
        self.margin[index] = torch.where(better, found, before)
        successes = self._successes[index] + (going & (found > 0))
        settled = found > _SETTLED * (logits.amax(1) - logits.amin(1))
        going &= (successes < 2) & ~settled
        self._successes[index], self._done[index] = successes, ~going
        self._updated = True
        return going


def for_each_image(values: Tensor, images: Tensor) -> Tensor:
    """``values``, one for each image ``(n,)``, in a shape that broadcasts with ``images``."""
    return values.view(-1, *[1] * (images.dim() - 1))


_SETTLED = 0.05


def normalised(gradient: Tensor) -> Tensor:
    """Each image's gradient divided by the mean of its absolute values."""
    scale = gradient.abs().mean(tuple(range(1, gradient.dim())), keepdim=True)
    return gradient / scale.clamp_min(1e-30)
