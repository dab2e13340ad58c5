"""AutoAttack and its Square attack, as published, through the pyautoattack library.

Croce and Hein, ICML 2020 (AutoAttack); Andriushchenko, Croce, Flammarion and Hein, "Square Attack: a
query-efficient black-box adversarial attack via random search", ECCV 2020.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt, dataclasses
from torch import Tensor, nn

from kwta_exp.attacks.base import Attack, Connected, MaxQueries, NotApplicableError, frozen
from kwta_exp.fields import STRICT, Eps, Norm
from kwta_exp.randomness import isolated

_NORMS = {"linf": "Linf", "l2": "L2"}


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class AutoAttack(Attack):
    """The ensemble: APGD on two losses, FAB and Square, each on the images that are not fooled yet.

    With fewer than ten classes its targeted attacks run towards all wrong ones. Of a random network it sees
    single answers, as published; ``version="rand"`` averages its gradients over 20.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        version: ``"standard"``, ``"plus"``, or ``"rand"`` for randomised networks.
        steps: iterations of its gradient attacks; 100 as published, and only then is it AutoAttack.
        queries: of Square; 5,000 as published.

    It draws from global generators, which are seeded from the images' keys for the call and restored
    after it: outcomes depend on the batch.

    Raises:
        NotApplicableError: from a call, as :class:`Square`'s.
    """

    norm: Norm
    eps: Eps
    version: Literal["standard", "plus", "rand"] = "standard"
    steps: PositiveInt = 100
    queries: PositiveInt = 5000

    sees_single_answers: ClassVar[bool] = True

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images; see :class:`~kwta_exp.attacks.Attack`."""
        import pyautoattack

        _require_tiles(self.norm, x)
        seed = int(keys.sum()) % 2**31
        with isolated(seed), frozen(model), _quiet():
            ensemble: Any = pyautoattack.AutoAttack(
                Connected(model), norm=_NORMS[self.norm], eps=self.eps, version=self.version, seed=seed,
                device=x.device,
            )  # fmt: skip
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

    def max_queries(self, classes: int) -> MaxQueries:
        """As counted on images that are never fooled."""
        run, targets = self.steps + 3, min(9, classes - 1)
        towards = targets if classes >= 4 else 0  # runs of targeted APGD
        losses = 2 if classes >= 3 else 1  # of untargeted APGD
        if self.version == "rand":
            return MaxQueries(20 * losses * run, 20 * losses * run)  # each gradient is a mean of 20
        untargeted, fab = (5 * losses, 5) if self.version == "plus" else (1, 0)
        forwards = untargeted + towards + 2 * targets + 2 * fab
        backwards = untargeted + towards + targets + fab * classes
        return MaxQueries(forwards * run + self.queries + 20, backwards * run)


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Square(Attack):
    """Random search over squares of one colour. It needs logits alone, so masked gradients do not stop it.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        eps: radius of the ball, in pixel units of [0, 1].
        queries: of each restart.
        restarts: independent searches, each on the images that are not fooled yet.
        p_init: share of the pixels in the first squares; 0.8 in AutoAttack.

    Raises:
        NotApplicableError: from a call, under ``norm="l2"`` for image sizes that the library cannot handle:
            sides under 5 pixels, 12, 14, 18, 19 or 24, and some whose sides differ.
    """

    norm: Norm
    eps: Eps
    queries: PositiveInt = 5000
    restarts: PositiveInt = 1
    p_init: float = 0.8

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
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

    def max_queries(self, classes: int) -> MaxQueries:
        """All queries of all restarts."""
        return MaxQueries(self.restarts * (self.queries + 3) + 1, 0)


def _require_tiles(norm: Norm, x: Tensor) -> None:
    """An L2 search of the library begins with tiles, five to the height; on some sizes they do not fit."""
    height, width = x.shape[2:]
    tile = height // 5
    margin = (height - 5 * tile) // 2
    if norm == "l2" and (
        tile == 0 or (tile > 1 and any(margin + side // tile * tile > side for side in (height, width)))
    ):
        raise NotApplicableError(f"pyautoattack's L2 Square attack cannot handle {height}x{width} images")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the library's warnings, which are meant for its own reports."""
    logger = logging.getLogger("auto-attack")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
