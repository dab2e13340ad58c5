"""Decides whether an image is fooled: the exact network, evaluated twice."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kwta_exp.failures import first_line, is_of_the_machine, is_out_of_memory

log = logging.getLogger(__name__)


class Judgement(NamedTuple):
    """The logits ``(N, K)`` of images, and which are misclassified and confirmed to be, bool ``(N,)``.

    ``errors``, int64 ``(N,)``, is how many draws of a random network err.
    """

    logits: Tensor
    misclassified: Tensor
    confirmed: Tensor
    errors: Tensor | None = None


class Answers(NamedTuple):
    """The logits ``(N, K)`` of images, and for a random network how many draws err, int64 ``(N,)``."""

    logits: Tensor
    errors: Tensor | None = None


class Judge:
    """A network in float32, frozen and in eval mode, and a second opinion on its errors.

    A winner-take-all network is discontinuous, so rounding alone can flip a prediction, and rounding depends on
    the size of the batch. So batches are padded to one size. An error counts if it occurs in float32 in such a
    batch, and again either in a batch of another size or in float64.

    If a batch does not fit in memory, it is halved, with a warning, since that decides last bits. If one image
    does not fit in float64, float64 is computed on the CPU. What does not fit even so is an error, not a
    verdict.

    Args:
        network: images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``.
        batch_size: of the padded batches.

    Attributes:
        draws: answers that one verdict takes.
    """

    draws = 1

    def __init__(self, network: nn.Module, batch_size: int) -> None:
        self.network = network
        self.batch_size = batch_size
        self._in_double = _InDouble(network, batch_size)

    def __call__(self, x: Tensor, y: Tensor) -> Judgement:
        """Classify ``x`` and confirm the errors."""
        logits = self.logits(x)
        wrong = misclassified(logits, y)
        confirmed = wrong.clone()
        confirmed[wrong] = self._misclassified_again(x[wrong], y[wrong])
        return Judgement(logits, wrong, confirmed)

    def answers(self, x: Tensor, y: Tensor) -> Answers:
        """What counts as the network's answer to images of the classes ``y``: its logits."""
        return Answers(self.logits(x))

    def logits(self, x: Tensor) -> Tensor:
        """Logits in float32, whatever precision the run trains in."""
        while True:
            logits = self._in_batches(x, self.batch_size, can_shrink=self.batch_size > 1)
            if logits is not None:
                return logits
            self.batch_size = (self.batch_size + 1) // 2
            log.warning("not enough memory: from here on images are judged %d at a time", self.batch_size)

    def _in_batches(self, x: Tensor, size: int, can_shrink: bool) -> Tensor | None:
        """The logits in padded batches of ``size``; ``None`` if memory runs out and ``can_shrink``."""
        try:
            return torch.cat([self._padded(some, size) for some in x.split(size)])
        except (RuntimeError, MemoryError) as error:
            if not (can_shrink and is_out_of_memory(error)):
                raise
            return None

    @torch.no_grad()
    def _padded(self, x: Tensor, size: int) -> Tensor:
        missing = size - len(x)
        full = torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing and len(x) else x
        with torch.autocast(x.device.type, enabled=False), _without_tf32(x.device):
            logits: Tensor = self.network(full)
        return logits[: len(x)]

    def _misclassified_again(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether the errors of a batch of :attr:`batch_size` occur in another size or in float64."""
        again = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if not len(x):
            return again
        size = self.batch_size // 2 if self.batch_size > 1 else 2
        while (logits := self._in_batches(x, size, can_shrink=True)) is None and size > 2:
            size //= 2
        if logits is not None:
            again = misclassified(logits, y)
        if again.all():
            return again
        double = self.logits_in_double(x[~again])
        if double is not None:
            again[~again] = misclassified(double, y[~again])
        elif logits is None:  # there is no second opinion
            self._in_batches(x, size, can_shrink=False)
        return again

    def logits_in_double(self, x: Tensor) -> Tensor | None:
        """Logits in float64; ``None`` if the network does not run in it."""
        return self._in_double.logits(x)


@contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    """By default torch's convolutions round float32 to ten bits on a GPU."""
    if device.type != "cuda":
        yield
        return
    libraries: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [library.allow_tf32 for library in libraries]
    try:
        for library in libraries:
            library.allow_tf32 = False
        yield
    finally:
        for library, allowed in zip(libraries, before, strict=True):
            library.allow_tf32 = allowed


class _InDouble:
    """A copy of a network in float64, in smaller batches or on the CPU where memory requires it."""

    def __init__(self, network: nn.Module, batch_size: int) -> None:
        self.network = network
        self.batch_size = batch_size
        self._copy: nn.Module | None = None
        self._on_cpu = False
        self._runs = True

    def logits(self, x: Tensor) -> Tensor | None:
        """Logits in float64, on the device of ``x``; ``None`` if the network does not run in it.

        Raises:
            RuntimeError: if one image fits neither on the device nor, where the network runs there, on the CPU.
        """
        while self._runs:
            try:
                return self._computed(x)
            except Exception as error:  # a network may require float32 in any way
                if is_out_of_memory(error):
                    cause = first_line(error)
                    if self._on_cpu or (self.batch_size == 1 and x.device.type == "cpu"):
                        raise
                elif self._on_cpu or is_of_the_machine(error):
                    raise
                else:
                    log.info("the network does not run in float64 (%s); errors are confirmed in float32", error)
                    self._runs = False
                    return None
            self._shrink(cause)
        return None

    def _shrink(self, cause: str) -> None:
        """Halve the batch; from a single image, go to the CPU."""
        if self.batch_size > 1:
            self.batch_size = (self.batch_size + 1) // 2
            log.warning("not enough memory: float64 takes %d images at a time", self.batch_size)
        else:
            log.warning("not enough memory (%s): float64 is computed on the CPU", cause)
            self._copy, self._on_cpu = None, True

    @torch.no_grad()
    def _computed(self, x: Tensor) -> Tensor:
        if self._copy is None:
            self._copy = (_copy_on_cpu(self.network) if self._on_cpu else copy.deepcopy(self.network)).double()
        device = torch.device("cpu") if self._on_cpu else x.device
        with torch.autocast(device.type, enabled=False):
            parts = [self._copy(some.to(device, torch.double)) for some in x.split(self.batch_size)]
        return torch.cat(parts).to(x.device)


def _copy_on_cpu(network: nn.Module) -> nn.Module:
    """A copy of a network that takes no memory of the network's own device."""
    parameters = {
        id(each): nn.Parameter(each.detach().cpu(), requires_grad=False) for each in network.parameters()
    }
    copies: dict[int, Any] = parameters | {id(each): each.detach().cpu() for each in network.buffers()}
    return copy.deepcopy(network, copies)


def predicted(logits: Tensor) -> Tensor:
    """The class, or -1 where a logit is NaN: no class is predicted, and that is an error."""
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Which predictions are wrong, bool ``(N,)``."""
    return predicted(logits) != y
