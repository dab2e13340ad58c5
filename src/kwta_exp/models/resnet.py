"""ResNet, with the activation of your choice where the k-WTA study puts it.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016: the common form
for small images (a 3x3 stem of stride 1, no max-pool), or the paper's own stem for large ones.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import PositiveInt, validate_call
from torch import Tensor, nn

from kwta_exp.fields import STRICT
from kwta_exp.models.factory import ActivationFactory, Activations, per_stage


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; activations after ``bn1`` and after the sum."""

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int, activation: ActivationFactory, conv_bias: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=conv_bias)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=conv_bias)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = activation()
        self.shortcut = _shortcut(in_channels, channels, stride, conv_bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        summed: Tensor = self.act2(out + self.shortcut(x))
        return summed


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions around a shortcut; an activation after each of
    ``bn1`` and ``bn2``, and after the sum.
    """

    expansion = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int, activation: ActivationFactory, conv_bias: bool
    ) -> None:
        super().__init__()
        wide = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=conv_bias)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=conv_bias)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = activation()
        self.conv3 = nn.Conv2d(channels, wide, 1, bias=conv_bias)
        self.bn3 = nn.BatchNorm2d(wide)
        self.act3 = activation()
        self.shortcut = _shortcut(in_channels, wide, stride, conv_bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.act2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        summed: Tensor = self.act3(out + self.shortcut(x))
        return summed


def _shortcut(in_channels: int, channels: int, stride: int, conv_bias: bool) -> nn.Sequential:
    """The identity where shapes agree, else a 1x1 convolution and a BatchNorm."""
    if stride == 1 and in_channels == channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, stride=stride, bias=conv_bias), nn.BatchNorm2d(channels)
    )


Block = type[BasicBlock] | type[Bottleneck]

_DEPTHS: dict[int, tuple[Block, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """ResNet-18, -34, -50, -101 or -152.

    Args:
        activation: makes the activation of the blocks: after ``bn1`` (and ``bn2`` in bottlenecks) and
            after each residual sum. A list of four gives each stage its own (the original code's
            default ratios were 0.5, 0.4, 0.3 and 0.2).
        stem_activation: makes the stem's. The original k-WTA networks keep a ReLU there, their ImageNet
            variant has k-WTA.
        depth: 18, 34, 50, 101 or 152.
        width: channels of the first stage; each later stage doubles them.
        stem: ``"3x3"``, stride 1 and no max-pool (the k-WTA study, on ImageNet too); ``"7x7"``, stride 2
            and a max-pool (He et al. 2016), sixteen times cheaper on large images.
        conv_bias: give the blocks' convolutions a bias, as the original's ReLU ResNet-50, -101 and -152 do.
        num_classes: number of logits.
        in_channels: channels of the input.

    The final pooling is global, which at 32x32 equals the original's 4x4 average and makes other
    sizes work. Parameters are named as in the original repository (``conv1``, ``bn1``,
    ``layer<i>.<j>``, ``shortcut.0/.1``, ``linear``).
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        activation: Activations,
        num_classes: PositiveInt,
        in_channels: PositiveInt,
        stem_activation: ActivationFactory = nn.ReLU,
        depth: Literal[18, 34, 50, 101, 152] = 18,
        width: PositiveInt = 64,
        stem: Literal["3x3", "7x7"] = "3x3",
        conv_bias: bool = False,
    ) -> None:
        super().__init__()
        block, blocks = _DEPTHS[depth]
        if stem == "3x3":
            self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = stem_activation()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "7x7" else nn.Identity()
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            _stage(
                block,
                in_channels=_inputs(block, width, stage),
                channels=width << stage,
                blocks=blocks[stage],
                stride=1 if stage == 0 else 2,
                activation=factory,
                conv_bias=conv_bias,
            )
            for stage, factory in enumerate(per_stage(activation, 4))
        )
        self.linear = nn.Linear((width << 3) * block.expansion, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images in [0, 1]."""
        out = self.pool(self.act(self.bn1(self.conv1(x_NCHW))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _inputs(block: Block, width: int, stage: int) -> int:
    """Channels that reach a stage."""
    return width if stage == 0 else (width << (stage - 1)) * block.expansion


def _stage(
    block: Block,
    in_channels: int,
    channels: int,
    blocks: int,
    stride: int,
    activation: ActivationFactory,
    conv_bias: bool,
) -> nn.Sequential:
    """A row of blocks, of which the first one has the stride."""
    first = block(in_channels, channels, stride, activation, conv_bias)
    wide = channels * block.expansion
    rest = (block(wide, channels, 1, activation, conv_bias) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
