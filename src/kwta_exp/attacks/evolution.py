"""Evolution strategies: gradients of the margin estimated from its values, as in the attack that broke k-WTA.

Tramèr, Carlini, Brendel and Mądry, "On Adaptive Attacks to Adversarial Example Defenses", NeurIPS 2020
(arXiv 2002.08347), section 5. A winner-take-all network jumps everywhere, so its gradient at a point says
nothing about the neighbourhood; differences over a distance that spans many jumps do. The estimator is that
of Wierstra et al., "NonNegativeInt Evolution Strategies", JMLR 2014, with antithetic draws.
"""

from collections.abc import Callable

import torch
from pydantic import PositiveFloat, PositiveInt, dataclasses
from torch import Tensor, nn

from kwta_exp.attacks.losses import excess, margin
from kwta_exp.attacks.threat import Threat
from kwta_exp.attacks.together import micro_batched
from kwta_exp.fields import STRICT, AtLeastTwo, Eps, Norm
from kwta_exp.randomness import fold, normal


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class EvolutionStrategies:
    """Steps along ``sum_u [m(x + s u) - m(x - s u)] u``, u standard normal, m the margin of error.

    No random start. The queries may leave [0, 1] and the ball, as in the paper's code; the iterates do
    not. An image is let go as soon as it is fooled.

    Args:
        norm: ``"linf"`` or ``"l2"``; the step follows the estimate's steepest direction in it.
        eps: radius of the ball, in pixel units of [0, 1].
        steps: at most so many.
        samples: queries of each step, half of them on each side; an even number.
        sigma: s, the distance of the queries, in pixel units.
        step_size: length of a step, in pixel units.
        chunk: the most images sent through the network at once; fewer where a GPU's memory does not suffice.
    """

    norm: Norm
    eps: Eps
    steps: PositiveInt = 100
    samples: PositiveInt = 400
    sigma: PositiveFloat = 8 / 255
    step_size: Eps = 0.01
    chunk: AtLeastTwo = 1000

    def __post_init__(self) -> None:
        if any(samples % 2 for _, samples in self.schedule):
            raise ValueError(f"samples={self.samples} is odd; expected pairs")

    @property
    def schedule(self) -> list[tuple[int, int]]:
        """(steps, samples of each), in turn."""
        return [(self.steps, self.samples)]

    @torch.no_grad()
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        threat = Threat(norm=self.norm, eps=self.eps)
        x_adv, asked = x.clone(), micro_batched(model, self.chunk)
        standing = torch.arange(len(x), device=x.device)
        step = 0
        for steps, samples in self.schedule:
            for _ in range(steps):
                standing = standing[excess(asked(x_adv[standing]), y[standing]) <= 0]
                if not len(standing):
                    return x_adv
                for i in standing.split(1):
                    direction = self._estimate(asked, x_adv[i], y[i], fold(step, keys[i]), samples)
                    moved = x_adv[i] + self.step_size * threat.steepest(direction)
                    x_adv[i] = threat.project(moved, x[i])
                step += 1
        return x_adv

    def passes(self, classes: int) -> tuple[int, int]:
        """The most passes, forward and backward, for one image."""
        return sum(steps * (samples + 1) for steps, samples in self.schedule), 0

    def _estimate(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, key: Tensor, samples: int
    ) -> Tensor:
        """The gradient of the margin at one image ``(1, C, H, W)``, up to a factor."""
        total = torch.zeros_like(x)
        numbers = torch.arange(samples // 2, device=x.device)
        for some in numbers.split(max(1, self.chunk // 2)):
            u = normal(fold(int(key), some), x.shape[1:]).to(x)
            queries = torch.cat([x + self.sigma * u, x - self.sigma * u])
            values = margin(model(queries), y.expand(len(queries)))
            ahead, behind = values.chunk(2)
            differences = (ahead - behind).to(u).nan_to_num(0.0, 0.0, 0.0)  # those without a number say nothing
            total += torch.einsum("n,nchw->chw", differences, u)
        return total


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class NES:
    """The attack of Tramèr et al. 2020 on k-WTA with every number as they had it.

    100 steps of 0.01 in L-inf, queries at 8/255: 100 a step for 20 steps, 1,000 for 20 more, 20,000 for
    the last 60. That is up to 1.22 million forward passes for an image that withstands.

    Args:
        norm: ``"linf"``.
        eps: radius of the ball; theirs was 0.031.
        chunk: the most images sent through the network at once; fewer where a GPU's memory does not suffice.

    Raises:
        ValueError: for another norm.
    """

    norm: Norm
    eps: Eps
    chunk: AtLeastTwo = 1000

    def __post_init__(self) -> None:
        if self.norm != "linf":
            raise ValueError("nes is the published L-inf attack; for other norms take attack=es")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """Adversarial images inside the ball and [0, 1]; see :class:`~kwta_exp.attacks.Attack`."""
        return self._published(model, x, y, keys)

    def passes(self, classes: int) -> tuple[int, int]:
        """The most passes, forward and backward, for one image."""
        return self._published.passes(classes)

    @property
    def _published(self) -> EvolutionStrategies:
        return _Published(norm=self.norm, eps=self.eps, chunk=self.chunk)


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class _Published(EvolutionStrategies):
    @property
    def schedule(self) -> list[tuple[int, int]]:
        return [(20, 100), (20, 1000), (60, 20000)]
