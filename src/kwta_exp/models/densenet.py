"""DenseNet for small images, with the activation of your choice where the k-WTA study puts it.

Huang, Liu, van der Maaten and Weinberger, "Densely Connected Convolutional Networks", CVPR 2017
(DenseNet-BC), in the common form for 32x32 images: a 3x3 stem of stride 1 and no max-pool.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, validate_call
from torch import Tensor, nn

from kwta_exp.fields import STRICT
from kwta_exp.models.factory import ActivationFactory, Activations, per_stage


class DenseLayer(nn.Module):
    """BatchNorm, activation, convolution, twice; the result goes *before* its input.

    That order is the original's and the reverse of torchvision's. In the other order the weights load but give
    wrong results.
    """

    def __init__(self, in_channels: int, growth: int, activation: ActivationFactory) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = activation()
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.act2 = activation()
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(self.act1(self.bn1(x)))
        new = self.conv2(self.act2(self.bn2(new)))
        return torch.cat([new, x], 1)


class Transition(nn.Module):
    """BatchNorm, activation, 1x1 convolution, 2x2 average pooling."""

    def __init__(self, in_channels: int, channels: int, activation: ActivationFactory) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.act = activation()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(self.act(self.bn(x))), 2)


_DEPTHS = {
    121: (32, (6, 12, 24, 16)),
    161: (48, (6, 12, 36, 24)),
    169: (32, (6, 12, 32, 32)),
    201: (32, (6, 12, 48, 32)),
}
"""Growth rate, and the layers of each block."""


class DenseNet(nn.Module):
    """DenseNet-121, -161, -169 or -201.

    Args:
        activation: makes the two activations of every dense layer and the one of every transition. A list
            of four gives each dense block (with the transition after it) its own.
        last_activation: makes the one before the final pooling; the original k-WTA networks keep a ReLU
            there. The stem has none.
        depth: 121, 161, 169 or 201.
        growth: channels that each layer adds; ``None`` takes the depth's own (48 for 161, else 32).
        num_classes: number of logits.
        in_channels: channels of the input.

    The final pooling is global, which at 32x32 equals the original's 4x4 average. Parameters are named
    as in the original repository (``dense<i>.<j>``, ``trans<i>``, ``bn``, ``linear``).
    """

    dense1: nn.Module
    dense2: nn.Module
    dense3: nn.Module
    dense4: nn.Module
    trans1: nn.Module
    trans2: nn.Module
    trans3: nn.Module

    @validate_call(config=STRICT)
    def __init__(
        self,
        activation: Activations,
        num_classes: PositiveInt,
        in_channels: PositiveInt,
        last_activation: ActivationFactory = nn.ReLU,
        depth: Literal[121, 161, 169, 201] = 121,
        growth: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        usual_growth, layers = _DEPTHS[depth]
        growth = growth or usual_growth
        factories = per_stage(activation, 4)
        channels = 2 * growth
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        for block, (count, factory) in enumerate(zip(layers, factories, strict=True), start=1):
            dense = nn.Sequential(
                *(DenseLayer(channels + layer * growth, growth, factory) for layer in range(count))
            )
            self.add_module(f"dense{block}", dense)
            channels += count * growth
            if block < len(layers):
                self.add_module(f"trans{block}", Transition(channels, channels // 2, factory))
                channels //= 2
        self.bn = nn.BatchNorm2d(channels)
        self.act = last_activation()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images in [0, 1]."""
        out = self.conv1(x_NCHW)
        out = self.trans1(self.dense1(out))
        out = self.trans2(self.dense2(out))
        out = self.trans3(self.dense3(out))
        out = self.act(self.bn(self.dense4(out)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits
