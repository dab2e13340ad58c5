"""AutoAttack and its Square attack, as published, through the pyautoattack library.

Croce and Hein, ICML 2020 (AutoAttack); Andriushchenko, Croce, Flammarion and Hein, "Square Attack: a
query-efficient black-box adversarial attack via random search", ECCV 2020.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import PositiveInt, dataclasses
from torch import Tensor, nn

from kwta_exp.attacks.base import NotApplicableError, frozen
from kwta_exp.fields import STRICT, Eps, Norm
from kwta_exp.randomness import isolated

_NORMS = {"linf": "Linf", "l2": "L2"}


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class AutoAttack:
    """The ensemble: APGD on two losses, FAB and Square, each on the images that still stand.

    Where the data has fewer than ten classes its targeted parts run towards as many as there are.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        version: ``"standard"``, ``"plus"``, or ``"rand"`` for randomised networks.
        steps: iterations of its gradient attacks; 100 as published, and only then is it AutoAttack.
        queries: of Square; 5,000 as published.

    It draws from global generators, which are seeded from the images' keys for the call and put back
    after: outcomes depend on the batch.

    Raises:
        NotApplicableError: from a call, as :class:`Square`'s.
    """

    norm: Norm
    eps: Eps
    version: Literal["standard", "plus", "rand"] = "standard"
    steps: PositiveInt = 100
    queries: PositiveInt = 5000

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """Adversarial images; see :class:`~kwta_exp.attacks.Attack`."""
        import pyautoattack

        _require_tiles(self.norm, x)
        seed = int(keys.sum()) % 2**31
        with isolated(seed), frozen(model), _quiet():
            ensemble: Any = pyautoattack.AutoAttack(
                model, norm=_NORMS[self.norm], eps=self.eps, version=self.version, seed=seed, device=x.device
            )
            with torch.no_grad():
                wrong_classes = model(x[:1]).shape[1] - 1
            ensemble.square.n_queries = self.queries
            for part in (ensemble.apgd, ensemble.apgd_targeted, ensemble.fab):
                part.n_iter = self.steps
                if hasattr(part, "n_target_classes"):
                    part.n_target_classes = min(part.n_target_classes, wrong_classes)
            needed = {"apgd-dlr": 2, "apgd-t": 3}  # wrong classes, for the DLR loss and the targeted one
            ensemble.attacks_to_run = [
                name for name in ensemble.attacks_to_run if needed.get(name, 0) <= wrong_classes
            ]
            found, _ = ensemble.run_standard_evaluation(x.clone(), y, batch_size=len(x))
        result: Tensor = found.detach()
        return result

    def passes(self, classes: int) -> tuple[int, int]:
        """The most passes, forward and backward, for one image, as counted on images that withstand."""
        run, targets = self.steps + 3, min(9, classes - 1)
        towards = targets if classes >= 4 else 0  # runs of targeted APGD
        losses = 2 if classes >= 3 else 1  # of untargeted APGD
        if self.version == "rand":
            return 20 * losses * run, 20 * losses * run  # each gradient is a mean of 20
        untargeted, fab = (5 * losses, 5) if self.version == "plus" else (1, 0)
        forwards = untargeted + towards + 2 * targets + 2 * fab
        return forwards * run + self.queries + 20, (untargeted + towards + targets + fab * classes) * run


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Square:
    """Random search over squares of one colour: asks for logits alone, so nothing is masked from it.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        queries: of each restart.
        restarts: independent searches, each on the images that still stand.
        p_init: share of the pixels in the first squares; 0.8 in AutoAttack.

    Raises:
        NotApplicableError: from a call, under ``norm="l2"`` for images of a side that the library cannot
            begin on: under 5 pixels, 12, 14, 18, 19 or 24, and some whose sides differ.
    """

    norm: Norm
    eps: Eps
    queries: PositiveInt = 5000
    restarts: PositiveInt = 1
    p_init: float = 0.8

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """Adversarial images; see :class:`~kwta_exp.attacks.Attack`."""
        from pyautoattack.square import SquareAttack

        _require_tiles(self.norm, x)
        seed = int(keys.sum()) % 2**31
        with isolated(seed), _quiet():
            search = SquareAttack(
                model, norm=_NORMS[self.norm], eps=self.eps, n_queries=self.queries, p_init=self.p_init,
                n_restarts=self.restarts, seed=seed, device=x.device, resc_schedule=False,
            )  # fmt: skip
            found: Tensor = search.perturb(x.clone(), y)
        return found.detach()

    def passes(self, classes: int) -> tuple[int, int]:
        """The most passes, forward and backward, for one image."""
        return self.restarts * (self.queries + 3) + 1, 0


def _require_tiles(norm: Norm, x: Tensor) -> None:
    """The library covers an image with tiles, five to its height, before an L2 search; some do not fit in."""
    height, width = x.shape[2:]
    tile = height // 5
    margin = (height - 5 * tile) // 2
    if norm == "l2" and (
        tile == 0 or (tile > 1 and any(margin + side // tile * tile > side for side in (height, width)))
    ):
        raise NotApplicableError(f"pyautoattack's L2 Square attack cannot begin on {height}x{width} images")


@contextmanager
def _quiet() -> Iterator[None]:
    """The library's warnings, made for its own reports, are not shown between ours."""
    logger = logging.getLogger("auto-attack")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
