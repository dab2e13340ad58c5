"""The small convolutional network of the k-WTA study (its MNIST network)."""

from typing import Annotated

from pydantic import Field, PositiveInt, validate_call
from torch import Tensor, nn

from kwta_exp.fields import STRICT
from kwta_exp.models.factory import ActivationFactory

FourWidths = Annotated[list[PositiveInt], Field(min_length=4, max_length=4)]


class CNN(nn.Module):
    """Four 3x3 convolutions (the 2nd and 4th with stride 2), a hidden linear layer, logits.

    Every convolution and the hidden layer are followed by the activation; there is no
    normalisation and no pooling.

    Args:
        activation: makes the activation of each layer.
        channels: output channels of the four convolutions. The study used 32/32/64/64 and up.
        hidden: width of the linear layer.
        num_classes: number of logits.
        in_channels: channels of the input.
        image_size: (height, width) of the input.

    Parameters are named ``cnn.<i>`` like the original repository's MNIST network.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        activation: ActivationFactory,
        channels: FourWidths,
        hidden: PositiveInt,
        num_classes: PositiveInt,
        in_channels: PositiveInt,
        image_size: tuple[PositiveInt, PositiveInt],
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, stride in zip(channels, (1, 2, 1, 2), strict=True):
            layers += [nn.Conv2d(in_channels, width, 3, stride=stride, padding=1), activation()]
            in_channels = width
        height, width = (-(-side // 4) for side in image_size)  # two strides of 2, rounded up
        self.cnn = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear(in_channels * height * width, hidden),
            activation(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images in [0, 1]."""
        logits: Tensor = self.cnn(x_NCHW)
        return logits
