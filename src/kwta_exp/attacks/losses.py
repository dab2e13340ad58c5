"""What an attack raises: one number an image, larger when the model is nearer to an error."""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

LossName = Literal["ce", "margin"]


def cross_entropy(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """``-log softmax(z)_y``, shape ``(N,)``."""
    return F.cross_entropy(logits_NK, y_N, reduction="none")


def margin(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """``max_{j != y} z_j - z_y``, shape ``(N,)``: positive exactly where the model errs.

    Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017, f_6
    without its threshold.
    """
    true_N1 = logits_NK.gather(1, y_N[:, None])
    others_NK = logits_NK.scatter(1, y_N[:, None], float("-inf"))
    return others_NK.amax(1) - true_N1[:, 0]


LOSSES: dict[LossName, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "margin": margin,
}
