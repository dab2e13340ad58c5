"""Several tries at the same images, each on those that still stand."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kwta_exp.attacks.losses import excess

Try = Callable[[Tensor], Tensor]
"""Given positions ``(n,)`` in the batch, adversarial images for these."""


def best_of(tries: Iterable[Try], model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Run ``tries`` in turn until every image is fooled; keep what has the largest margin of error.

    Each costs one more forward pass of the images it was run on, so that what counts is what the model
    as it is now, whatever hooks a try had put in, makes of them.
    """
    best, best_margin = x.clone(), x.new_full((len(x),), float("-inf"))
    standing = torch.arange(len(x), device=x.device)
    for attempt in tries:
        found = attempt(standing)
        with torch.no_grad():
            reached = excess(model(found), y[standing]).to(best_margin)
        better = reached > best_margin[standing]
        best[standing[better]] = found[better]
        best_margin[standing[better]] = reached[better]
        standing = standing[best_margin[standing] <= 0]
        if not len(standing):
            break
    return best
