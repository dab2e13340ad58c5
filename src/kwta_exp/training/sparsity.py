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
        """The ratio of epoch ``epoch`` (from 0) of ``epochs``; ``None`` leaves each layer its own."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Constant(Sparsity):
    """Each layer keeps its own ratio throughout."""

    def ratio(self, epoch: int, epochs: int) -> None:
        return None


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Incremental(Sparsity):
    """Lower the ratio by ``step`` every ``every`` epochs, down to ``final``.

    Args:
        start: the ratio of the first epochs.
        final: the last ratio.
        step: how much each step lowers it; 0.005 in the study (0.001 on MNIST).
        every: epochs between two steps; 2 in the study (1 on MNIST).
        hold: additional epochs at ``start`` before the first step, for a training from scratch.
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
        final: the ratio after the descent.
        over: the share of the epochs that the descent takes, in (0, 1].
    """

    start: Ratio
    final: Ratio
    over: Ratio = 0.5

    def __post_init__(self) -> None:
        _check_order(self.start, self.final)

    def ratio(self, epoch: int, epochs: int) -> float:
        steps = max(1, math.ceil(self.over * epochs) - 1)
        return self.final + (self.start - self.final) * self._remaining(min(1.0, epoch / steps))

    def _remaining(self, progress: float) -> float:
        """The remaining share of the descent at ``progress``, both in [0, 1]."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Linear(_Smooth):
    """In equal steps."""

    def _remaining(self, progress: float) -> float:
        return 1 - progress


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Cosine(_Smooth):
    """Along half a cosine: slow at the beginning and at the end."""

    def _remaining(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


def _check_order(start: float, final: float) -> None:
    if final > start:
        raise ValueError(f"final={final} is above start={start}; expected final <= start")


def layers_with_ratio(network: nn.Module) -> list[Any]:
    """The k-WTA layers that have a ratio and not a fixed ``k``: those that a schedule sets."""
    return [module for module in network.modules() if isinstance(module, KWTA) and module.ratio is not None]


def set_ratio(network: nn.Module, ratio: float) -> None:
    """Set the sparsity ratio of every k-WTA layer of ``network``.

    Raises:
        ValueError: if no layer has a ratio.
    """
    layers = layers_with_ratio(network)
    if not layers:
        raise ValueError("the network has no k-WTA layer with a ratio; expected activation=kwta")
    for layer in layers:
        layer.ratio = ratio
