"""Whether gradients lead anywhere, image by image."""

from typing import Any

import torch
from torch import Tensor

from kwta_exp.attacks import PGD, Threat
from kwta_exp.attacks.base import MicroBatches
from kwta_exp.attacks.losses import Loss, cross_entropy, margin
from kwta_exp.evaluation.checks.base import EVALUATING, OBFUSCATED, Check, per_image
from kwta_exp.evaluation.judge import misclassified
from kwta_exp.failures import no_gradient_exists
from kwta_exp.randomness import fold

STEPS = 40
"""Of the gradient ascent that is watched."""

PIECES = 64
"""Of the straight path from an image to the edge of its ball."""

LARGE_EPS = 0.5
"""In pixel units: every image can be made grey, so no network is robust there."""


@per_image(
    Check(
        name="robust_at_large_eps",
        threshold=0.05,
        bears_on="worst case",
        source=OBFUSCATED,
        meaning="PGD fails at a radius where every image can be made grey",
        measured="images that plain PGD does not fool at eps 0.5, where every image can be made grey",
        sign=True,
    )
)
def robust_at_large_eps(
    calls: MicroBatches, x: Tensor, y: Tensor, keys: Tensor, threat: Threat
) -> dict[str, Tensor]:
    """Which images plain PGD does not fool in a ball that holds a grey image."""
    network: Any = calls.model
    eps = LARGE_EPS * (1.0 if threat.norm == "linf" else x[0].numel() ** 0.5)
    try:
        found = PGD(norm=threat.norm, eps=eps, steps=STEPS)(network, x, y, keys, calls.size)
    except RuntimeError as error:
        if not no_gradient_exists(error):
            raise
        found = x
    return {"robust_at_large_eps": (~misclassified(calls.logits(found), y)).double()}


@per_image(
    Check(
        name="gradients_are_zero",
        threshold=0.05,
        bears_on="worst case",
        source=EVALUATING,
        meaning="gradients vanish on the path of PGD",
        measured="steps of plain PGD, until it succeeds, at which the gradient is exactly zero",
        sign=True,
    ),
    Check(
        name="gradients_are_not_finite",
        threshold=0.0,
        bears_on="worst case",
        source=EVALUATING,
        meaning="gradients are NaN or infinite",
        measured="steps of plain PGD, until it succeeds, at which the gradient is NaN or infinite",
        sign=True,
    ),
    Check(
        name="last_is_not_best",
        threshold=0.1,
        bears_on="plain gradients",
        source=EVALUATING,
        meaning="PGD ends below the best point on its path",
        measured="of the margin that PGD gained at its best, what it has lost again at the end",
        sign=True,
    ),
    Check(
        name="still_rising",
        threshold=0.1,
        bears_on="plain gradients",
        source=EVALUATING,
        meaning="PGD has not converged",
        measured="of the margin that PGD gained at its best, what the last quarter of the steps brought",
    ),
)
def ascent(calls: MicroBatches, x: Tensor, y: Tensor, keys: Tensor, threat: Threat) -> dict[str, Tensor]:
    """Watch plain PGD on the cross-entropy, as long as an image is not fooled."""
    x_adv = threat.random_point(x, keys)
    step_size = 2.5 * threat.eps / STEPS
    margins, zero, broken = [], [], []
    for _ in range(STEPS):
        gradient, logits = _gradient(calls, x_adv, y, cross_entropy)
        margins.append(margin(logits, y))
        flat = gradient.flatten(1)
        broken.append(~flat.isfinite().all(1))
        zero.append((flat == 0).all(1))
        x_adv = threat.project(x_adv + step_size * threat.steepest(gradient.nan_to_num(0, 0, 0)), x)
    margins.append(margin(calls.logits(x_adv), y))

    curve = torch.stack(margins).double()
    best = curve.cummax(0).values
    not_fooled = (best <= 0)[:-1].double()
    steps = not_fooled.sum(0)
    gained = best[-1] - curve[0]
    useful = (best[-1] <= 0) & (gained > 0)
    nothing = torch.full_like(gained, float("nan"))

    def share_of_steps(which: list[Tensor]) -> Tensor:
        return torch.where(steps > 0, (torch.stack(which) * not_fooled).sum(0) / steps, nothing)

    return {
        "gradients_are_zero": share_of_steps(zero),
        "gradients_are_not_finite": share_of_steps(broken),
        "last_is_not_best": torch.where(useful, (best[-1] - curve[-1]) / gained, nothing),
        "still_rising": torch.where(useful, (best[-1] - best[3 * STEPS // 4]) / gained, nothing),
    }


@per_image(
    Check(
        name="change_unseen_by_gradients",
        threshold=0.2,
        bears_on="plain gradients",
        source=OBFUSCATED,
        meaning="the loss changes in ways that its gradient does not show",
        measured="of the margin's change along 64 pieces of a straight path to the edge of the ball, what the"
        " mean gradient at the ends of each piece does not account for: near 0 for networks that are piecewise"
        " linear, near 1 for discontinuous ones",
        sign=True,
    )
)
def change_unseen_by_gradients(
    calls: MicroBatches, x: Tensor, y: Tensor, keys: Tensor, threat: Threat
) -> dict[str, Tensor]:
    """The share of the margin's change along a straight path that its gradient does not account for.

    The path leads to a random corner (or point of the sphere). On each piece the change is compared with the
    mean gradient of both ends times the piece: 0 for a network that is linear on each piece, near 0 for a
    smooth one, and 1 where the gradient is unrelated to the change.
    """
    end = threat.random_edge_point(x, fold(1, keys))
    piece = (end - x) / PIECES
    before: tuple[Tensor, Tensor] | None = None
    unseen = torch.zeros(len(x), dtype=torch.double, device=x.device)
    total = torch.zeros_like(unseen)
    for step in range(PIECES + 1):
        gradient, logits = _gradient(calls, x + step * piece, y, margin)
        value = margin(logits, y).double()
        slope = (gradient * piece).flatten(1).double().sum(1)
        if before is not None:
            change = value - before[0]
            unseen += (change - (slope + before[1]) / 2).abs()
            total += change.abs()
        before = value, slope
    return {"change_unseen_by_gradients": (unseen / total.clamp_min(1e-12)).clamp(0, 1)}


def _gradient(calls: MicroBatches, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """The input gradient and the logits; 0 where no gradient exists."""
    try:
        gradient, logits, _ = calls.gradient(x, y, loss)
    except RuntimeError as error:
        if not no_gradient_exists(error):
            raise
        return torch.zeros_like(x), calls.logits(x)
    return gradient, logits
