"""VGG with BatchNorm, for images of 32 pixels and up.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
ICLR 2015, configurations A, B, D and E, with the small classifier (512-512-512) usual for CIFAR-10.
"""

import math
from typing import Literal

import torch.nn.functional as F
from pydantic import PositiveInt, validate_call
from torch import Tensor, nn

from kwta_exp.fields import STRICT, Rate
from kwta_exp.models.factory import ActivationFactory

_CONVOLUTIONS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""3x3 convolutions of each of the five stages; a 2x2 max-pool ends a stage."""


class VGG(nn.Module):
    """VGG-11, -13, -16 or -19.

    Args:
        activation: makes the activation after every convolution and after the two hidden linear layers.
        depth: 11, 13, 16 or 19.
        width: channels of the first stage; they double up to eight times that.
        batch_norm: a BatchNorm between each convolution and its activation.
        dropout: share of values dropped before each hidden linear layer, in [0, 1).
        num_classes: number of logits.
        in_channels: channels of the input.

    The last max-pool rounds up, so images smaller than 32x32 keep one pixel; the features are averaged over
    the remaining pixels. Convolutions start normal with variance
    2 / (k * k * out_channels). Parameters are named as in the original repository (``features.<i>``,
    ``classifier.<i>``), which used VGG with ReLUs as a source of transferred attacks.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        activation: ActivationFactory,
        num_classes: PositiveInt,
        in_channels: PositiveInt,
        depth: Literal[11, 13, 16, 19] = 16,
        width: PositiveInt = 64,
        batch_norm: bool = True,
        dropout: Rate = 0.5,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage, convolutions in enumerate(_CONVOLUTIONS[depth]):
            channels = width << min(stage, 3)
            for _ in range(convolutions):
                layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(channels))
                layers.append(activation())
                in_channels = channels
            layers.append(nn.MaxPool2d(2, ceil_mode=stage == 4))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(in_channels, in_channels),
            activation(),
            nn.Dropout(dropout),
            nn.Linear(in_channels, in_channels),
            activation(),
            nn.Linear(in_channels, num_classes),
        )
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, math.sqrt(2 / (9 * module.out_channels)))
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images in [0, 1]."""
        out = F.adaptive_avg_pool2d(self.features(x_NCHW), 1)
        logits: Tensor = self.classifier(out.flatten(1))
        return logits
