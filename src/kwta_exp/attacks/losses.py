"""What an attack raises: one number an image, larger when the model is nearer to an error."""

import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["ce", "margin", "dlr", "kl"]

Which = Tensor | slice
"""Positions in a batch."""

ALL = slice(None)


def cross_entropy(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """``-log softmax(z)_y``, shape ``(N,)``."""
    return F.cross_entropy(logits_NK, y_N, reduction="none")


def margin(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """``max_{j != y} z_j - z_y``, shape ``(N,)``: positive exactly where the model misclassified.

    Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017, f_6
    without its threshold.
    """
    true_N1 = logits_NK.gather(1, y_N[:, None])
    others_NK = logits_NK.scatter(1, y_N[:, None], float("-inf"))
    return others_NK.amax(1) - true_N1[:, 0]


def excess(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """The margin, positive exactly where the judge finds an error; to rank images by, not to differentiate.

    A logit that is NaN is an error beyond any margin; of logits tied for the largest, the first decides.
    """
    erred = logits_NK.argmax(1) != y_N
    m = margin(logits_NK, y_N).nan_to_num(0.0, math.inf, -math.inf)  # of two infinite logits, say
    m = torch.where(erred & (m <= 0), torch.finfo(m.dtype).tiny, m)
    return torch.where(logits_NK.isnan().any(1), math.inf, m)


def dlr(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """``(max_{j != y} z_j - z_y) / (z_1 - z_3)`` with z_1 >= z_2 >= ... sorted, shape ``(N,)``.

    Croce and Hein, ICML 2020, equation 6: the margin, whatever the scale and shift of the logits. Needs
    three classes.
    """
    ordered = logits_NK.sort(1, descending=True).values
    return margin(logits_NK, y_N) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


class Loss(Protocol):
    """What is raised, for the images of a batch or for some of them."""

    def __call__(self, logits_NK: Tensor, at: Which = ...) -> Tensor:
        """One number an image; ``at``: the positions in the batch of those that the logits belong to."""
        ...


def targeted_dlr(y_N: Tensor, target_N: Tensor) -> Loss:
    """``(z_t - z_y) / (z_1 - (z_3 + z_4) / 2)`` as a function of logits (equation 7; four classes)."""

    def loss(logits_NK: Tensor, at: Which = ALL) -> Tensor:
        ordered = logits_NK.sort(1, descending=True).values
        true, wanted = (logits_NK.gather(1, each[at][:, None])[:, 0] for each in (y_N, target_N))
        return (wanted - true) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)

    return loss


def targeted_loss(name: LossName, y_N: Tensor, target_N: Tensor) -> Loss:
    """The loss called ``name`` towards the class ``target_N``, as a function of logits.

    ``"ce"`` is ``log softmax(z)_t``, ``"margin"`` is ``z_t - z_y``, ``"dlr"`` is :func:`targeted_dlr`.
    """
    if name == "dlr":
        return targeted_dlr(y_N, target_N)
    if name == "margin":
        return lambda z, at=ALL: (z.gather(1, target_N[at][:, None]) - z.gather(1, y_N[at][:, None]))[:, 0]
    return lambda z, at=ALL: -cross_entropy(z, target_N[at])


def wrong_classes(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """All classes but the true one, likeliest at ``x`` first, ``(N, K - 1)``."""
    with torch.no_grad():
        logits = model(x)
    ranking: Tensor = logits.scatter(1, y[:, None], float("-inf")).argsort(1, descending=True)[:, :-1]
    return ranking


def divergence(logits_NK: Tensor, reference_NK: Tensor) -> Tensor:
    """``KL(p || q)`` of the softmax of ``reference_NK`` (p) and of ``logits_NK`` (q), shape ``(N,)``."""
    q, p = logits_NK.log_softmax(1), reference_NK.log_softmax(1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(1)


def attack_loss(name: LossName, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Loss:
    """The loss called ``name`` as a function of logits; ``"kl"`` is away from the prediction at ``x``."""
    if name == "kl":
        with torch.no_grad():
            reference = model(x)
        return lambda logits, at=ALL: divergence(logits, reference[at])
    formula = {"ce": cross_entropy, "margin": margin, "dlr": dlr}[name]
    return lambda logits, at=ALL: formula(logits, y[at])
