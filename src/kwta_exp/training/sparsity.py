"""Sparsity schedules: the ratio of every k-WTA layer as a function of the epoch.

Xiao, Zhong and Zheng 2020, section 3.2, lower the ratio of a trained network step by step ("incremental
fine-tuning"), since small ratios are hard to train from scratch.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, dataclasses
from torch import nn

from kwta_exp.activations import KWTA
from kwta_exp.fields import STRICT, Ratio


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Sparsity(ABC):
    """A schedule of the sparsity ratio."""

    @abstractmethod
    def ratio(self, epoch: int, epochs: int) -> float | None:
        """The ratio that epoch ``epoch`` (from 0) of ``epochs`` trains with; ``None`` leaves it alone."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Constant(Sparsity):
    """The activation's own ratio throughout (which may differ between layers)."""

    def ratio(self, epoch: int, epochs: int) -> None:
        return None


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Incremental(Sparsity):
    """Lowered by ``step`` after every ``every`` epochs, until ``final``.

    Args:
        start: the ratio of the first epochs.
        final: where it stops.
        step: taken off each time; 0.005 in the study (0.001 on MNIST).
        every: epochs between two steps; 2 in the study (1 on MNIST).
        hold: epochs at ``start`` before the first step, beside the ``every`` there always are; for a
            training from scratch.
    """

    start: Ratio
    final: Ratio
    step: PositiveFloat = 0.005
    every: PositiveInt = 2
    hold: NonNegativeInt = 0

    def __post_init__(self) -> None:
        _check_order(self.start, self.final)

    def ratio(self, epoch: int, epochs: int) -> float:
        lowered = self.start - self.step * (max(0, epoch - self.hold) // self.every)
        return self.final if lowered < self.final + 1e-9 else round(lowered, 12)


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class _Smooth(Sparsity):
    """From ``start`` to ``final`` over a part of the training, then constant.

    Args:
        start: the ratio of the first epoch.
        final: the ratio from the end of the descent on.
        over: the share of the epochs that the descent takes, in (0, 1].
    """

    start: Ratio
    final: Ratio
    over: Ratio = 0.5

    def __post_init__(self) -> None:
        _check_order(self.start, self.final)

    def ratio(self, epoch: int, epochs: int) -> float:
        steps = max(1, math.ceil(self.over * epochs) - 1)
        return self.final + (self.start - self.final) * self._left(min(1.0, epoch / steps))

    def _left(self, progress: float) -> float:
        """The share of the way still to go after ``progress`` of the descent, both in [0, 1]."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Linear(_Smooth):
    """In equal steps."""

    def _left(self, progress: float) -> float:
        return 1 - progress


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Cosine(_Smooth):
    """Along half a cosine: slowly at first and at the end."""

    def _left(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


def _check_order(start: float, final: float) -> None:
    if final > start:
        raise ValueError(f"final={final} is above start={start}; expected a ratio that falls")


def scheduled(network: nn.Module) -> list[Any]:
    """The layers whose ratio a schedule moves: k-WTA with a ratio (not a fixed k)."""
    return [module for module in network.modules() if isinstance(module, KWTA) and module.ratio is not None]


def set_ratio(network: nn.Module, ratio: float) -> None:
    """Give every k-WTA layer of ``network`` this sparsity ratio.

    Raises:
        ValueError: if it has none with a ratio.
    """
    layers = scheduled(network)
    if not layers:
        raise ValueError("the network has no k-WTA layer with a ratio; expected activation=kwta")
    for layer in layers:
        layer.ratio = ratio
