"""What an attack increases: ``loss(logits, y)``, one number an image, larger when the model is nearer to an
error.

``y`` is whatever the loss compares the logits with: labels ``(N,)``; labels and targets ``(N, 2)`` for a
targeted loss; or the logits ``(N, K)`` at the clean image for ``"kl"``. An attack drops its rows together with
those of ``x``.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["ce", "margin", "dlr", "kl"]

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(logits_NK, y)``, shape ``(N,)``."""


def cross_entropy(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """``-log softmax(z)_y``, shape ``(N,)``."""
    return F.cross_entropy(logits_NK, y_N, reduction="none")


def margin(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """``max_{j != y} z_j - z_y``, shape ``(N,)``: positive exactly where the model misclassifies.

    Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017, f_6 without its
    threshold.
    """
    true_N1 = logits_NK.gather(1, y_N[:, None])
    others_NK = logits_NK.scatter(1, y_N[:, None], float("-inf"))
    return others_NK.amax(1) - true_N1[:, 0]


def ranking_margin(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """The margin, made positive exactly where the judge finds an error; for ranking, not for gradients.

    A NaN logit is an error beyond any margin. Of logits tied for the largest, the first decides.
    """
    misclassified = logits_NK.argmax(1) != y_N
    m = margin(logits_NK, y_N).nan_to_num(0.0, math.inf, -math.inf)  # of two infinite logits, say
    m = torch.where(misclassified & (m <= 0), torch.finfo(m.dtype).tiny, m)
    return torch.where(logits_NK.isnan().any(1), math.inf, m)


def dlr(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """``(max_{j != y} z_j - z_y) / (z_1 - z_3)`` with z_1 >= z_2 >= ... sorted, shape ``(N,)``.

    Croce and Hein, ICML 2020, equation 6: the margin, whatever the scale and shift of the logits. Needs
    three classes.
    """
    ordered = logits_NK.sort(1, descending=True).values
    return margin(logits_NK, y_N) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def divergence(logits_NK: Tensor, reference_NK: Tensor) -> Tensor:
    """``KL(p || q)`` of the softmax of ``reference_NK`` (p) and of ``logits_NK`` (q), shape ``(N,)``."""
    q, p = logits_NK.log_softmax(1), reference_NK.log_softmax(1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(1)


def targeted_cross_entropy(logits_NK: Tensor, y_N2: Tensor) -> Tensor:
    """``log softmax(z)_t``; the columns of ``y_N2`` are y and t, as for all targeted losses."""
    return -cross_entropy(logits_NK, y_N2[:, 1])


def targeted_margin(logits_NK: Tensor, y_N2: Tensor) -> Tensor:
    """``z_t - z_y``."""
    true, target = logits_NK.gather(1, y_N2).unbind(1)
    return target - true


def targeted_dlr(logits_NK: Tensor, y_N2: Tensor) -> Tensor:
    """``(z_t - z_y) / (z_1 - (z_3 + z_4) / 2)`` (Croce and Hein, equation 7; needs four classes)."""
    ordered = logits_NK.sort(1, descending=True).values
    scale = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
    return targeted_margin(logits_NK, y_N2) / (scale + 1e-12)


LOSSES: dict[LossName, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr, "kl": divergence}
TARGETED: dict[LossName, Loss] = {
    "ce": targeted_cross_entropy, "margin": targeted_margin, "dlr": targeted_dlr,
}  # fmt: skip


def loss_and_labels(
    name: LossName, logits_of: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[Loss, Tensor]:
    """The untargeted loss called ``name``, and what it compares logits with.

    Args:
        name: of the loss; ``"kl"`` is the divergence from the prediction at ``x``.
        logits_of: images to logits, without a graph; called for ``"kl"`` alone.
        x: the clean images.
        y: their labels.
    """
    return LOSSES[name], logits_of(x) if name == "kl" else y


def targeted(
    name: LossName, logits_of: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, targets: int
) -> list[tuple[Loss, Tensor]]:
    """The targeted loss called ``name`` and its labels, for each of the ``targets`` likeliest wrong classes.

    Raises:
        ValueError: for ``"dlr"`` with fewer than four classes.
    """
    logits = logits_of(x)
    if name == "dlr" and (classes := logits.shape[1]) < 4:
        raise ValueError(f"targets={targets}: the targeted DLR loss needs 4 classes or more, not {classes}")
    ranking = logits.scatter(1, y[:, None], float("-inf")).argsort(1, descending=True)[:, :-1]
    return [(TARGETED[name], torch.stack([y, target], 1)) for target in ranking.T[:targets]]
