"""The pieces of a network along a line, and the jumps between them.

A network of linear layers with k-WTA, LWTA or ReLU is an affine function wherever the set of units that are not
zero stays the same, so along a line it consists of affine pieces. Where a ReLU unit starts or stops, the pieces
meet. Where one k-WTA winner replaces another, the output jumps, since the values of the two are equal there but
their weights are not (Xiao et al. 2020, arXiv 1905.10510).
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kwta_exp.activations import KWTA, LWTA
from kwta_exp.errors import UserError
from kwta_exp.progress import Progress
from kwta_exp.randomness import fold, key, uniform

JUMP = 1e-6
"""The smallest jump, as a share of the output's range along the line. A continuous network changes by about
1e-9 of it over :data:`RESOLUTION`.
"""

RESOLUTION = 2.0**-30
"""The width, as a share of the line, to which a change is located."""

FIRST_CELLS, MOST_CELLS = 1 << 10, 1 << 18
"""Equal parts of the line in which changes are searched: at first, and at most."""

Array = npt.NDArray[np.float64]

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From positions ``(M,)``, outputs ``(M, C)`` and a number for each one's pattern, ``(M,)`` int64."""


@dataclass(frozen=True)
class Pieces:
    """The affine pieces of a function along a line.

    Attributes:
        length: of the line.
        changes: positions where the pattern changes, ascending, shape ``(P,)``.
        jumps: the largest change of an output at each of them, shape ``(P,)``.
        scale: the range of the output that varies most, over the line.
        cells: the equal parts in which changes were searched. A change that is undone within one of them is
            missed, so the numbers are lower bounds.
    """

    length: float
    changes: Array
    jumps: Array
    scale: float
    cells: int

    @property
    def discontinuities(self) -> Array:
        """The positions of the changes at which an output jumps by more than :data:`JUMP` of its range."""
        return self.changes[self.jumps > JUMP * self.scale]

    @property
    def density(self) -> float:
        """Discontinuities in a unit of length."""
        return len(self.discontinuities) / self.length


def pieces(evaluate: Evaluate, low: float, high: float) -> Pieces:
    """Find the changes of pattern between ``low`` and ``high`` by bisection.

    The line is cut into equal cells. A cell whose ends differ in pattern is halved, and each of its halves
    whose ends differ, until the change is located. The number of cells is doubled until that finds no more.

    Args:
        evaluate: the function; it should compute in float64.
        low: where the line begins.
        high: where it ends.
    """
    cells = FIRST_CELLS
    found = _located(evaluate, low, high, cells)
    while cells < MOST_CELLS:
        cells *= 2
        finer = _located(evaluate, low, high, cells)
        done = len(finer.changes) <= len(found.changes)
        found = finer
        if done:
            break
    return found


def _located(evaluate: Evaluate, low: float, high: float, cells: int) -> Pieces:
    positions = torch.linspace(low, high, cells + 1, dtype=torch.float64)
    outputs, patterns = evaluate(positions)
    scale = float((outputs.amax(0) - outputs.amin(0)).max())
    ends = _Ends(positions, patterns, outputs)
    here = _differing(ends.part(slice(0, -1)), ends.part(slice(1, None)))
    for _ in range(max(0, math.ceil(math.log2(1 / (cells * RESOLUTION))))):
        left, right = here
        if not len(left.positions):
            break
        middle = (left.positions + right.positions) / 2
        centre = _Ends(middle, *reversed(evaluate(middle)))
        below, above = _differing(left, centre), _differing(centre, right)
        here = below[0].with_(above[0]), below[1].with_(above[1])
    left, right = here
    order = left.positions.argsort()
    jumps = (right.outputs - left.outputs).abs().amax(1) if len(order) else torch.zeros(0)
    middle = (left.positions + right.positions) / 2
    return Pieces(high - low, middle[order].numpy(), jumps[order].double().numpy(), scale, cells)


@dataclass(frozen=True)
class _Ends:
    """Ends of intervals: positions ``(M,)``, patterns ``(M,)`` and outputs ``(M, C)``."""

    positions: Tensor
    patterns: Tensor
    outputs: Tensor

    def part(self, chosen: slice | Tensor) -> "_Ends":
        return _Ends(self.positions[chosen], self.patterns[chosen], self.outputs[chosen])

    def with_(self, other: "_Ends") -> "_Ends":
        pairs = zip(
            (self.positions, self.patterns, self.outputs), (other.positions, other.patterns, other.outputs),
            strict=True,
        )  # fmt: skip
        return _Ends(*(torch.cat(pair) for pair in pairs))


def _differing(left: _Ends, right: _Ends) -> tuple[_Ends, _Ends]:
    """The intervals whose ends differ in pattern."""
    differ = left.patterns != right.patterns
    return left.part(differ), right.part(differ)


class Patterns:
    """A network in float64 that tells which of its units are not zero.

    Args:
        network: with k-WTA, LWTA or ReLU layers as modules; it is copied, and judged in evaluation mode.
        batch: inputs that go through it at once.

    Raises:
        UserError: if it has no such layer.
    """

    def __init__(self, network: nn.Module, batch: int = 256) -> None:
        self.network = copy.deepcopy(network).double().eval().requires_grad_(False)
        self.batch = batch
        self.layers = [layer for layer in self.network.modules() if isinstance(layer, KWTA | LWTA | nn.ReLU)]
        if not self.layers:
            raise UserError(
                f"{type(network).__name__}: has no layer of the kinds KWTA, LWTA and ReLU; expected one whose"
                " units can be told to be zero or not"
            )

    def at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits ``(N, C)`` of inputs, and a number for each one's pattern, ``(N,)`` int64.

        Two patterns have the same number with a probability of about 2^-63.
        """
        logits, numbers = [], []
        for part in x.split(self.batch):
            with self._masks() as masks:
                logits.append(self.network(part.double()))
            hashes = [_hashed(active, call) for call, active in enumerate(masks)]
            numbers.append(torch.stack(hashes).sum(0))
        return torch.cat(logits).cpu(), torch.cat(numbers).cpu()

    def activity(self, x: Tensor) -> tuple[float, float]:
        """The share of units that fire (are not zero) for some of the inputs, and of those that fire for some
        and not for others: these *flip*.
        """
        fires, stays = torch.tensor(False), torch.tensor(True)
        for part in x.split(self.batch):
            with self._masks() as masks:
                self.network(part.double())
            active = torch.cat(masks, 1).cpu()
            fires, stays = fires | active.any(0), stays & active.all(0)
        return float(fires.double().mean()), float((fires & ~stays).double().mean())

    @contextmanager
    def _masks(self) -> Iterator[list[Tensor]]:
        """Each layer's mask ``(N, U)``, in the order of calls, once the network has run."""
        masks: list[Tensor] = []

        def hook(_: nn.Module, inputs: object, output: Tensor) -> None:
            masks.append(output.flatten(1) != 0)

        handles = [layer.register_forward_hook(hook) for layer in self.layers]
        try:
            with torch.no_grad():
                yield masks
        finally:
            for handle in handles:
                handle.remove()


def _hashed(active: Tensor, call: int) -> Tensor:
    """The sum of one random int64 for each unit that is active; sums of integers do not depend on the order."""
    random = fold(key(0, "pattern", call), torch.arange(active.shape[1], device=active.device))
    return torch.where(active, random, 0).sum(1)


def along(patterns: Patterns, x: Tensor, direction: Tensor, bounds: Sequence[float] | None) -> Evaluate:
    """The network along a line: ``t`` to its logits at ``x + t * direction``.

    Args:
        patterns: of the network.
        x: an input ``(...)``, where t = 0.
        direction: like ``x``.
        bounds: the lowest and the highest value of an input; values beyond are clipped, as an attack does.
    """

    def evaluate(t_M: Tensor) -> tuple[Tensor, Tensor]:
        inputs = x.double() + t_M.view(-1, *[1] * x.dim()).to(x.device) * direction.double()
        return patterns.at(inputs if bounds is None else inputs.clamp(*bounds))

    return evaluate


def around(patterns: Patterns, x_NCHW: Tensor, eps: float, seed: int) -> list[Pieces]:
    """The pieces of a network along one line for each image: along random signs, within ``eps`` of it.

    Args:
        patterns: of the network.
        x_NCHW: images in [0, 1], to which values along the lines are clipped.
        eps: of the L-inf norm; the unit of length is that of pixels.
        seed: of the directions.
    """
    keys = fold(key(seed, "line"), torch.arange(len(x_NCHW), device=x_NCHW.device))
    signs = torch.where(uniform(keys, x_NCHW.shape[1:]) < 0.5, -1.0, 1.0)
    with Progress("discontinuities", len(x_NCHW), "images") as progress:
        found = []
        for x, direction in zip(x_NCHW, signs, strict=True):
            found.append(pieces(along(patterns, x, direction, (0, 1)), -eps, eps))
            progress.advance()
    return found
