"""Transferred attacks: adversarial images of one network, tried on another.

Papernot, McDaniel and Goodfellow, "Transferability in Machine Learning", arXiv 1605.07277. They ask
nothing of the network that is judged, so masked gradients are no defence against them.
"""

from typing import Any

from pydantic import validate_call
from torch import Tensor, nn

from kwta_exp.attacks.base import Attack
from kwta_exp.fields import STRICT


class Transfer:
    """Runs an attack on a source network and hands over what it finds.

    Args:
        source: run folder of the source network.
        attack: any attack; it sees the source alone.

    Whoever builds this connects the network (:meth:`connect`). Passes through the source are not counted
    as queries of the judged network, of which there are none.
    """

    @validate_call(config=STRICT)
    def __init__(self, source: str | None, attack: Attack) -> None:
        self.source = source
        self.attack = attack
        self.network: nn.Module | None = None

    def __repr__(self) -> str:
        return f"Transfer(source={self.source!r}, attack={self.attack!r})"

    def connect(self, network: nn.Module) -> None:
        """Use ``network`` (frozen, and put in eval mode) as the source."""
        self.network = network.eval().requires_grad_(False)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """Adversarial images of the source; see :class:`~kwta_exp.attacks.Attack`."""
        if self.network is None:
            raise ValueError("no source network is connected")
        self.network.to(x.device)
        return self.attack(self.network, x, y, keys)

    def passes(self, classes: int) -> tuple[int, int]:
        """None through the network that is judged."""
        return 0, 0

    def details(self, model: nn.Module) -> dict[str, Any]:
        """Which network the images were made on, for the record."""
        return {"source": self.source}
