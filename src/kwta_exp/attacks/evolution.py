"""Evolution strategies: gradients of the margin estimated from its values, as in the attack that broke k-WTA.

Tramèr, Carlini, Brendel and Mądry, "On Adaptive Attacks to Adversarial Example Defenses", NeurIPS 2020
(arXiv 2002.08347), section 5. The gradient of a winner-take-all network at a point says nothing about the
neighbourhood, because the network jumps everywhere; differences over a distance that spans many jumps do. The
estimator is that of Wierstra et al., "Natural Evolution Strategies", JMLR 2014, with antithetic draws.
"""

from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt, dataclasses
from torch import Tensor, nn

from kwta_exp.attacks.base import Attack, MaxQueries, MicroBatches
from kwta_exp.attacks.losses import margin, ranking_margin
from kwta_exp.fields import STRICT, AtLeastTwo, Eps, Norm
from kwta_exp.randomness import fold, normal


class _FiniteDifferences(Attack):
    """Steps along ``sum_u [m(x + s u) - m(x - s u)] u``, u standard normal, m the margin.

    No random start. Queries may leave [0, 1] and the ball, as in the paper's code; iterates do not. An image is
    dropped as soon as it is fooled.
    """

    sigma: float
    step_size: float
    chunk: int

    @property
    def schedule(self) -> list[tuple[int, int]]:
        """(steps, samples of each), in turn."""
        raise NotImplementedError

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        threat, x_adv, batches = self.threat, x.clone(), MicroBatches(model, self.chunk)
        index, step = torch.arange(len(x), device=x.device), 0
        for steps, samples in self.schedule:
            for _ in range(steps):
                still_correct = ranking_margin(batches.logits(x_adv[index]), y[index]) <= 0
                index = index[still_correct.nonzero()[:, 0]]
                if not len(index):
                    return x_adv
                for i in index.split(1):
                    direction = self._estimate(batches, x_adv[i], y[i], fold(step, keys[i]), samples)
                    x_adv[i] = threat.project(x_adv[i] + self.step_size * threat.steepest(direction), x[i])
                step += 1
        return x_adv

    def _estimate(self, model: MicroBatches, x: Tensor, y: Tensor, key: Tensor, samples: int) -> Tensor:
        """The gradient of the margin at one image ``(1, C, H, W)``, up to a factor."""
        total = torch.zeros_like(x)
        for some in torch.arange(samples // 2, device=x.device).split(max(1, self.chunk // 2)):
            u = normal(fold(key, some), x.shape[1:]).to(x)
            queries = torch.cat([x + self.sigma * u, x - self.sigma * u])
            ahead, behind = margin(model.logits(queries), y.expand(len(queries))).chunk(2)
            differences = (ahead - behind).to(u).nan_to_num(0.0, 0.0, 0.0)
            total += torch.einsum("n,nchw->chw", differences, u)
        return total

    def max_queries(self, classes: int) -> MaxQueries:
        """All samples of all steps, and a look at the start of each step."""
        return MaxQueries(sum(steps * (samples + 1) for steps, samples in self.schedule), 0)


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class EvolutionStrategies(_FiniteDifferences):
    """Steps along ``sum_u [m(x + s u) - m(x - s u)] u``, u standard normal, m the margin.

    Args:
        norm: ``"linf"`` or ``"l2"``; the step follows the estimate's steepest direction in it.
        eps: radius of the ball, in pixel units of [0, 1].
        steps: the largest number of steps.
        samples: queries of each step, half of them on each side; an even number.
        sigma: s, the distance of the queries, in pixel units.
        step_size: length of a step, in pixel units.
        chunk: the most queries in one call of the model; fewer once a GPU runs out of memory.

    Raises:
        ValueError: for an odd number of samples.
    """

    norm: Norm
    eps: Eps
    steps: PositiveInt = 100
    samples: PositiveInt = 400
    sigma: PositiveFloat = 8 / 255
    step_size: Eps = 0.01
    chunk: AtLeastTwo = 1000

    independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.samples % 2:
            raise ValueError(f"samples={self.samples} is odd; expected pairs")

    @property
    def schedule(self) -> list[tuple[int, int]]:
        """(steps, samples of each), in turn."""
        return [(self.steps, self.samples)]


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class NES(_FiniteDifferences):
    """The attack of Tramèr et al. 2020 on k-WTA with every number as they had it.

    100 steps of 0.01 in L-inf, queries at 8/255: 100 a step for 20 steps, 1,000 for 20 more, 20,000 for
    the last 60. That is up to 1.22 million forward passes for an image that is never fooled.

    Args:
        norm: ``"linf"``.
        eps: radius of the ball; theirs was 0.031.
        chunk: the most queries in one call of the model; fewer once a GPU runs out of memory.

    Raises:
        ValueError: for another norm.
    """

    norm: Norm
    eps: Eps
    chunk: AtLeastTwo = 1000

    independent: ClassVar[bool] = True
    sigma: ClassVar[float] = 8 / 255  # type: ignore[misc]
    step_size: ClassVar[float] = 0.01  # type: ignore[misc]

    def __post_init__(self) -> None:
        if self.norm != "linf":
            raise ValueError("nes is the published L-inf attack; for other norms take attack=es")

    @property
    def schedule(self) -> list[tuple[int, int]]:
        """(steps, samples of each), in turn."""
        return [(20, 100), (20, 1000), (60, 20000)]
