"""What a network does around single images: one number for each, to see whether gradients lead anywhere.

See :mod:`kwta_exp.evaluation.diagnostics`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kwta_exp.attacks import PGD, Threat
from kwta_exp.attacks.losses import cross_entropy, margin
from kwta_exp.attacks.together import input_gradient
from kwta_exp.evaluation.judge import misclassified
from kwta_exp.randomness import fold

DRAWS = 200
"""Random points of each ball, half of them at its corners (or on its sphere)."""

PATH = 64
"""Pieces of the straight way from an image to the edge of its ball."""

STEPS = 40
"""Of the gradient ascent that is watched."""

LARGE_EPS = 0.5
"""In pixel units, a radius at which every image can be made grey: nothing is robust there."""

RANDOM_LOGITS = 1e-3
"""Relative difference of two answers to one question that rounding does not explain."""


def measured_per_image(
    network: nn.Module, x: Tensor, y: Tensor, keys: Tensor, threat: Threat
) -> dict[str, Tensor]:
    """One number for each image ``(N,)`` and measurement, NaN where it says nothing."""
    return {
        **_ascent(network, x, y, keys, threat),
        "change_unseen_by_gradients": _unseen_change(network, x, y, keys, threat),
        "robust_at_large_eps": _at_large_eps(network, x, y, keys, threat),
        "outputs_are_probabilities": _probabilities(network, x),
        "outputs_are_random": _random(network, x),
        "by_luck": fooled_by_random_search(network, x, y, keys, threat),
    }


def _ascent(network: nn.Module, x: Tensor, y: Tensor, keys: Tensor, threat: Threat) -> dict[str, Tensor]:
    """Watch plain PGD on the cross-entropy climb, as far as an image is not yet fooled.

    ``gradients_are_zero`` and ``gradients_are_not_finite`` are shares of its steps. Of what the margin of error
    gained from the start to its best, ``last_is_not_best`` is the share lost again at the end and
    ``still_rising`` the share that the last quarter of the steps brought.
    """
    x_adv = threat.random_point(x, keys)
    step_size = 2.5 * threat.eps / STEPS
    margins, zero, broken = [], [], []
    for _ in range(STEPS):
        gradient, logits = _gradient(network, x_adv, lambda z: cross_entropy(z, y))
        margins.append(margin(logits, y))
        flat = gradient.flatten(1)
        broken.append(~flat.isfinite().all(1))
        zero.append((flat == 0).all(1))
        x_adv = threat.project(x_adv + step_size * threat.steepest(gradient.nan_to_num(0, 0, 0)), x)
    with torch.no_grad():
        margins.append(margin(network(x_adv), y))

    curve = torch.stack(margins).double()
    climbing = (curve.cummax(0).values <= 0)[:-1].double()  # not fooled so far
    steps = climbing.sum(0)
    best = curve.cummax(0).values
    gained = best[-1] - curve[0]
    useful = (best[-1] <= 0) & (gained > 0)
    nothing = torch.full_like(gained, float("nan"))
    return {
        "gradients_are_zero": torch.where(steps > 0, (torch.stack(zero) * climbing).sum(0) / steps, nothing),
        "gradients_are_not_finite": torch.where(
            steps > 0, (torch.stack(broken) * climbing).sum(0) / steps, nothing
        ),
        "last_is_not_best": torch.where(useful, (best[-1] - curve[-1]) / gained, nothing),
        "still_rising": torch.where(useful, (best[-1] - best[3 * STEPS // 4]) / gained, nothing),
    }


def _gradient(network: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The input gradient and the logits; where no gradient comes back at all, it is 0."""
    try:
        gradient, logits, _ = input_gradient(network, x, loss)
    except RuntimeError:
        with torch.no_grad():
            return torch.zeros_like(x), network(x)
    return gradient, logits


def _unseen_change(network: nn.Module, x: Tensor, y: Tensor, keys: Tensor, threat: Threat) -> Tensor:
    """The share of the margin's change along a straight way that its gradient does not account for.

    On each of the pieces of the way to a random corner (or point of the sphere) the change is compared with the
    mean gradient of both ends times the piece; 0 for a network that is linear on each piece, near 0 for any
    that is smooth, and 1 where the gradient has nothing to do with what happens.
    """
    towards = threat.random_edge_point(x, fold(1, keys))
    piece = (towards - x) / PATH
    before: tuple[Tensor, Tensor] | None = None
    unseen = torch.zeros(len(x), dtype=torch.double, device=x.device)
    total = torch.zeros_like(unseen)
    for step in range(PATH + 1):
        gradient, logits = _gradient(network, x + step * piece, lambda z: margin(z, y))
        value = margin(logits, y)
        slope = (gradient * piece).flatten(1).double().sum(1)
        if before is not None:
            change = value.double() - before[0]
            unseen += (change - (slope + before[1]) / 2).abs()
            total += change.abs()
        before = value.double(), slope
    return (unseen / total.clamp_min(1e-12)).clamp(0, 1)


def _at_large_eps(network: nn.Module, x: Tensor, y: Tensor, keys: Tensor, threat: Threat) -> Tensor:
    """Which images plain PGD leaves standing where any can be made any other."""
    eps = LARGE_EPS * (1.0 if threat.norm == "linf" else x[0].numel() ** 0.5)
    try:
        found = PGD(norm=threat.norm, eps=eps, steps=STEPS)(network, x, y, keys)
    except RuntimeError:  # there is no gradient at all
        found = x
    with torch.no_grad():
        return (~misclassified(network(found), y)).double()


def _probabilities(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = network(x)
    return ((outputs >= 0).all(1) & ((outputs.sum(1) - 1).abs() < 1e-3)).double()


def _random(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        one: Tensor = network(x)
        other: Tensor = network(x)
    size = one.abs().amax(1).clamp_min(1e-12)
    return ((one - other).abs().amax(1) > RANDOM_LOGITS * size).double()


def fooled_by_random_search(network: nn.Module, x: Tensor, y: Tensor, keys: Tensor, threat: Threat) -> Tensor:
    """Which images a random point of the ball fools, bool ``(N,)``."""
    fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    with torch.no_grad():
        for draw in range(DRAWS):
            fooled |= misclassified(network(_draw(x, fold(2 + draw, keys), threat, draw)), y)
    return fooled


def _draw(x: Tensor, keys: Tensor, threat: Threat, number: int) -> Tensor:
    """A random point of each ball, or for odd numbers a corner (a point of the sphere)."""
    if number % 2 == 0:
        return threat.random_point(x, keys)
    return threat.random_edge_point(x, keys)
