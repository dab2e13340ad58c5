"""The fully connected network of the k-WTA study (784-h-h-10 on MNIST)."""

from pydantic import PositiveInt, validate_call
from torch import Tensor, nn

from kwta_exp.fields import STRICT
from kwta_exp.models.factory import ActivationFactory


class MLP(nn.Module):
    """Flatten, then one linear layer and one activation for each hidden width, then logits.

    Args:
        activation: makes the activation of each hidden layer (1-D: all h values compete).
        hidden: widths of the hidden layers.
        num_classes: number of logits.
        in_channels: channels of the input.
        image_size: (height, width) of the input.

    Parameters are named ``nn.<i>`` like the original repository's DNN.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        activation: ActivationFactory,
        hidden: list[PositiveInt],
        num_classes: PositiveInt,
        in_channels: PositiveInt,
        image_size: tuple[PositiveInt, PositiveInt],
    ) -> None:
        super().__init__()
        width = in_channels * image_size[0] * image_size[1]
        layers: list[nn.Module] = [nn.Flatten()]
        for next_width in hidden:
            layers += [nn.Linear(width, next_width), activation()]
            width = next_width
        self.nn = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images in [0, 1]."""
        logits: Tensor = self.nn(x_NCHW)
        return logits
