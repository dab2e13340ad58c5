"""How the processes of one training share its batches, so that together they take the steps of one process.

Process r of W takes rows r, r + W, ... of every batch. Each weighs its mean loss by W times its share of the
rows, so the mean of the processes' gradients, which DDP computes, is the gradient of the mean over the joint
batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kwta_exp.data.batches import Batch

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Shares:
    """This process's share. With one process everything is its share, and nothing is sent.

    Args:
        fabric: launched.

    Attributes:
        count: of processes.
        rank: the number of this one.
    """

    def __init__(self, fabric: "Fabric") -> None:
        self._fabric = fabric
        self.count, self.rank = fabric.world_size, fabric.global_rank

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def of_batch(self, batch: Batch) -> tuple[Batch, float]:
        """The rows of this process, and the weight of their mean loss.

        A batch with fewer rows than processes leaves some without: they take one row at weight 0, since all
        processes must take part in a step.
        """
        if self.count == 1:
            return batch, 1.0
        n = len(batch.y)
        own = slice(self.rank, None, self.count) if self.rank < n else slice(0, 1)
        part = Batch(batch.x[own], batch.y[own], batch.keys[own])
        return part, self.count * len(part.y) / n if self.rank < n else 0.0

    def has(self, number: int) -> bool:
        """Whether the validation batch of this number is this process's."""
        return number % self.count == self.rank

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.count == 1:
            return tensor
        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    def agreed(self, wish: bool) -> bool:
        """What the first process wishes."""
        return wish if self.count == 1 else bool(self._fabric.broadcast(wish))

    def agreed_at(self, step: int, wish: bool) -> bool:
        """The same, but several processes ask each other at every 16th step only, and do not wish between."""
        return self.agreed(wish) if self.count == 1 or step % 16 == 0 else False

    def wait(self) -> None:
        """Until all processes are here."""
        self._fabric.barrier()

    def whole(self, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all processes with their rows in the order of the batch, as one process has them."""
        if self.count == 1:
            return dict(memory)
        found: list[dict[str, Tensor]] = [{}] * self.count
        dist.all_gather_object(found, {name: tensor.cpu() for name, tensor in memory.items()})
        return {name: _interleaved([each[name] for each in found]) for name in memory}

    def own(self, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of what :meth:`whole` returned."""
        return {name: tensor[self.rank :: self.count] for name, tensor in memory.items()}

    @torch.no_grad()
    def average_statistics(self, model: nn.Module) -> None:
        """Give all processes the mean of their running statistics: each has seen other images."""
        if self.count == 1:
            return
        found = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if not found:
            return
        joint = torch.cat([buffer.flatten() for buffer in found])
        dist.all_reduce(joint)
        for buffer, mean in zip(
            found, (joint / self.count).split([each.numel() for each in found]), strict=True
        ):
            buffer.copy_(mean.view_as(buffer))


def _interleaved(parts: list[Tensor]) -> Tensor:
    """The tensor whose rows r, r + W, ... are ``parts[r]``."""
    joined = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        joined[rank :: len(parts)] = part
    return joined


@dataclass
class Sums:
    """Sums over the epoch so far; tensors stay on the device, so that no step waits for their values.

    ``images`` counts each training image once, ``forwarded`` once for each step taken on it.
    """

    loss: Tensor
    correct: Tensor
    forwarded: int = 0
    images: int = 0
    seconds: float = 0.0

    @classmethod
    def zero(cls, device: torch.device) -> "Sums":
        return cls(torch.zeros((), device=device), torch.zeros((), device=device))

    def add(self, loss: Tensor, correct_N: Tensor) -> None:
        """Add a step's mean loss and which of its images were classified correctly."""
        self.loss += loss * len(correct_N)
        self.correct += correct_N.sum()
        self.forwarded += len(correct_N)

    def of_all(self, shares: Shares) -> "Sums":
        """The sums over all processes, each of which counts the images of all."""
        if shares.count == 1:
            return self
        counted = torch.tensor(float(self.forwarded), device=self.loss.device)
        loss, right, forwarded = map(shares.total, (self.loss, self.correct, counted))
        return Sums(loss, right, int(forwarded), self.images, self.seconds)

    def of_rank(self, shares: Shares) -> "Sums":
        """Sums that add up to these over all processes."""
        if shares.is_first:
            return self
        nothing = torch.zeros_like(self.loss)
        return Sums(nothing, nothing.clone(), 0, self.images, self.seconds)

    def means(self) -> dict[str, Any]:
        """The loss, the accuracy and the speed."""
        return {
            "loss": self.loss.item() / self.forwarded,
            "accuracy": self.correct.item() / self.forwarded,
            "images_per_second": self.images / self.seconds,
        }
