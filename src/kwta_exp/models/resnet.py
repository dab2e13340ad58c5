"""ResNet for small images, with the activation of your choice where k-WTA goes.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, in the common
form for 32x32 images: a 3x3 stem of stride 1 and no max-pool.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import validate_call
from torch import Tensor, nn

from kwta_exp.fields import STRICT, Count
from kwta_exp.models.factory import ActivationFactory

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; activations after ``bn1`` and after the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int, activation: ActivationFactory) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = activation()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        summed: Tensor = self.act2(out + self.shortcut(x))
        return summed


class ResNet(nn.Module):
    """ResNet-18 or -34 for images of about 32x32.

    Args:
        activation: makes the activation after ``bn1`` and after each residual sum.
        stem_activation: makes the stem's; the original k-WTA networks keep a ReLU there.
        depth: 18 or 34.
        width: channels of the first stage; each later stage doubles them.
        num_classes: number of logits.
        in_channels: channels of the input.

    The final pooling is global, which at 32x32 equals the original's 4x4 average and makes other
    sizes work. Parameters are named as in the original repository (``conv1``, ``bn1``,
    ``layer<i>.<j>``, ``shortcut.0/.1``, ``linear``).
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        activation: ActivationFactory,
        num_classes: Count,
        in_channels: Count,
        stem_activation: ActivationFactory = nn.ReLU,
        depth: Literal[18, 34] = 18,
        width: Count = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = stem_activation()
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            _stage(width << max(stage - 1, 0), width << stage, blocks, activation)
            for stage, blocks in enumerate(_BLOCKS[depth])
        )
        self.linear = nn.Linear(width * 8, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images in [0, 1]."""
        out = self.act(self.bn1(self.conv1(x_NCHW)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, activation: ActivationFactory) -> nn.Sequential:
    """A row of blocks; the first one halves the image unless it keeps the channels."""
    stride = 1 if in_channels == channels else 2
    first = BasicBlock(in_channels, channels, stride, activation)
    rest = (BasicBlock(channels, channels, 1, activation) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
