"""Counting what an attack asks of a network."""

from typing import Any

from torch import Tensor, nn


class Counted(nn.Module):
    """A network that counts the images it is shown and those it returns gradients for.

    It shares the network's parameters and mode; a backward pass is counted when a gradient arrives
    at the logits, whoever asked for it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.forwards = 0
        self.backwards = 0
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits: Tensor = self.network(x)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def _count_backward(self, gradient: Tensor) -> Any:
        self.backwards += len(gradient)
