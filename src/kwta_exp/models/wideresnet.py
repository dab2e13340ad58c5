"""Wide ResNet, with k-WTA at every place of a ReLU, the last one too.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016: pre-activation blocks, dropout between
their two convolutions.
"""

import math

import torch.nn.functional as F
from pydantic import PositiveInt, validate_call
from torch import Tensor, nn

from kwta_exp.fields import STRICT, Rate
from kwta_exp.models.factory import ActivationFactory, Activations, per_stage


class PreActivationBlock(nn.Module):
    """BatchNorm, activation, convolution, twice, around a shortcut.

    A block that changes the number of channels feeds the *activated* input to its shortcut too.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        dropout: float,
        activation: ActivationFactory,
        conv_bias: bool,
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = activation()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=conv_bias)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = activation()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=conv_bias)
        self.convShortcut = (
            None
            if in_channels == channels
            else nn.Conv2d(in_channels, channels, 1, stride=stride, bias=conv_bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.bn1(x))
        out = self.act2(self.bn2(self.conv1(activated)))
        out = self.conv2(self.dropout(out))
        summed: Tensor = (x if self.convShortcut is None else self.convShortcut(activated)) + out
        return summed


class Group(nn.Module):
    """A row of blocks at one resolution, in ``layer`` (the original's name)."""

    def __init__(self, *blocks: PreActivationBlock) -> None:
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-d-w.

    Args:
        activation: makes every activation, or a list with one factory for each of the three groups (the
            last activation is then made by the third).
        depth: d = 6n + 4 with n blocks in each of the three groups, e.g. 22, 28, 34.
        widen_factor: w; the groups have 16w, 32w and 64w channels.
        dropout: share of values dropped between the two convolutions of a block, in [0, 1).
        conv_bias: give every convolution a bias, as the original's k-WTA networks have; its ReLU networks
            have none.
        num_classes: number of logits.
        in_channels: channels of the input.

    Convolutions start normal with variance 2 / (k * k * out_channels), biases at 0. The final pooling is
    global, which at 32x32 equals the original's 8x8 average. Parameters are named as in the original
    repository (``block<i>.layer.<j>``, ``convShortcut``, ``fc``).

    Raises:
        ValueError: for a depth that is not 6n + 4.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        activation: Activations,
        num_classes: PositiveInt,
        in_channels: PositiveInt,
        depth: PositiveInt = 28,
        widen_factor: PositiveInt = 10,
        dropout: Rate = 0.0,
        conv_bias: bool = False,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth={depth} is not 6n + 4; expected one such as 10, 16, 22, 28 or 34")
        factories = per_stage(activation, 3)
        widths = [16, *(16 * widen_factor << group for group in range(3))]
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=conv_bias)
        self.block1, self.block2, self.block3 = (
            Group(
                PreActivationBlock(
                    widths[group], widths[group + 1], min(group + 1, 2), dropout, factories[group], conv_bias
                ),
                *(
                    PreActivationBlock(
                        widths[group + 1], widths[group + 1], 1, dropout, factories[group], conv_bias
                    )
                    for _ in range(blocks - 1)
                ),
            )
            for group in range(3)
        )
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.act = factories[2]()
        self.fc = nn.Linear(widths[3], num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images in [0, 1]."""
        out = self.block3(self.block2(self.block1(self.conv1(x_NCHW))))
        out = self.act(self.bn1(out))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits
