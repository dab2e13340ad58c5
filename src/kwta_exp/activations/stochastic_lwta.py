"""Stochastic Local Winner-Take-All: the winner of each group is drawn, at test time too.

Panousis, Chatzis and Theodoridis, "Stochastic Local Winner-Takes-All Networks Enable Profound Adversarial
Robustness", arXiv 2112.02671: units compete in groups of neighbours, and the winner is drawn from the softmax
over the group. The draw is relaxed as in Jang, Gu and Poole, "Categorical Reparameterization with
Gumbel-Softmax", ICLR 2017.
"""

import torch
from pydantic import PositiveFloat, PositiveInt, validate_call
from torch import Tensor, nn

from kwta_exp.fields import STRICT

_TINY = 1e-8
"""Keeps the logarithms of the noise finite, as in the authors' code."""


def stochastic_lwta(x: Tensor, group_size: int = 2, temperature: float = 0.01) -> Tensor:
    """``x * softmax((x + g) / temperature)``, the softmax over each group of neighbouring units.

    ``g = -log(-log(u + 1e-8) + 1e-8)``, with ``u`` uniform in [0, 1), is Gumbel noise: one draw for each
    value of ``x``. As the temperature goes to 0, one unit of each group passes, each with its probability under
    the softmax of the group: of two units, the first with ``sigmoid(x1 - x2)``.

    Args:
        x: floating point ``(N, C, ...)``. The units that compete are ``group_size`` consecutive
            channels at the same position.
        group_size: units in a group; must divide C.
        temperature: of the softmax, above 0. The lower it is, the nearer the gates are to 0 and 1.

    Returns:
        A tensor like ``x``, other values at each call: the noise comes from torch's global generator of the
        device. It is drawn in float32 if ``x`` has half precision. A NaN makes its whole group NaN.

    Raises:
        ValueError: if ``group_size`` does not divide C, if ``temperature`` is not above 0, or if ``x`` has
            fewer than 2 dimensions.
    """
    if x.dim() < 2:
        raise ValueError(f"stochastic_lwta expects (N, C, ...), got {tuple(x.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; expected a number above 0")
    channels = x.shape[1]
    if channels % group_size:
        raise ValueError(f"group_size={group_size} does not divide the layer's {channels} units")
    noise = _gumbel_like(x)
    scores = ((x + noise) / temperature).unflatten(1, (channels // group_size, group_size))
    gates: Tensor = scores.softmax(dim=2).flatten(1, 2).to(x.dtype)
    return x * gates


def _gumbel_like(x: Tensor) -> Tensor:
    """Gumbel noise of the shape of ``x``, in float32 or float64: 1e-8 is nothing in half precision."""
    uniform = torch.rand_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    noise: Tensor = -((-((uniform + _TINY).log()) + _TINY).log())
    return noise


class StochasticLWTA(nn.Module):
    """Stochastic Local Winner-Take-All as a layer; see :func:`stochastic_lwta`.

    It is random in training and in evaluation mode.

    Args:
        group_size: units in a group.
        temperature: of the softmax in evaluation mode; the paper's is 0.01.
        training_temperature: of the softmax in training mode; the paper's is 0.67.
    """

    @validate_call(config=STRICT)
    def __init__(
        self,
        group_size: PositiveInt = 2,
        temperature: PositiveFloat = 0.01,
        training_temperature: PositiveFloat = 0.67,
    ) -> None:
        super().__init__()
        self.group_size = group_size
        self.temperature = temperature
        self.training_temperature = training_temperature

    def forward(self, x: Tensor) -> Tensor:
        temperature = self.training_temperature if self.training else self.temperature
        return stochastic_lwta(x, self.group_size, temperature)

    def extra_repr(self) -> str:
        return (
            f"group_size={self.group_size}, temperature={self.temperature},"
            f" training_temperature={self.training_temperature}"
        )
