"""Transferred attacks: adversarial images of one network, tried on another.

Papernot, McDaniel and Goodfellow, "Transferability in Machine Learning", arXiv 1605.07277. They spend no
queries on the network that is judged, so masked gradients are no defence against them.
"""

from typing import Any

from pydantic import SkipValidation, validate_call
from torch import Tensor, nn

from kwta_exp.attacks.base import Attack, MaxQueries
from kwta_exp.fields import STRICT, Norm


class Transfer(Attack):
    """Runs an attack on a source network and returns what it finds.

    Args:
        source: run folder of the source network.
        attack: any attack; it sees the source alone.

    Whoever builds this connects the network (:meth:`connect`). Passes through the source are not counted:
    queries are those of the judged network, of which there are none.
    """

    @validate_call(config=STRICT)
    def __init__(self, source: str | None, attack: SkipValidation[Attack]) -> None:
        self.source = source
        self.attack = attack
        self.network: nn.Module | None = None

    def __repr__(self) -> str:
        return f"Transfer(source={self.source!r}, attack={self.attack!r})"

    @property
    def norm(self) -> Norm:  # type: ignore[override]
        """That of the attack on the source."""
        return self.attack.norm

    @property
    def eps(self) -> float:  # type: ignore[override]
        """That of the attack on the source."""
        return self.attack.eps

    def connect(self, network: nn.Module) -> None:
        """Use ``network`` (frozen, and put in eval mode) as the source."""
        self.network = network.eval().requires_grad_(False)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, keys: Tensor, max_batch_size: int | None = None
    ) -> Tensor:
        """Adversarial images of the source; see :class:`~kwta_exp.attacks.Attack`."""
        if self.network is None:
            raise ValueError("no source network is connected")
        self.network.to(x.device)
        return self.attack(self.network, x, y, keys, max_batch_size)

    def max_queries(self, classes: int) -> MaxQueries:
        """None through the network that is judged."""
        return MaxQueries(0, 0)

    def details(self, model: nn.Module, x: Tensor) -> dict[str, Any]:
        """The network that the images were made on."""
        return {"source": self.source}
