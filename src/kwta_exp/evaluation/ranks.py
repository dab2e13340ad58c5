"""Chunks of an evaluation spread over the processes of a run: the first leads, the others follow.

Each round, process r attacks the r-th of the next W chunks and sends the result to the first, which keeps them
in order. Chunks and random streams do not depend on who attacks, so the records are those of one process.
"""

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from kwta_exp.evaluation.chunks import ChunkResult, Networks, attack_chunk

if TYPE_CHECKING:
    from kwta_exp.evaluation.evaluation import Evaluation

PATIENCE = datetime.timedelta(days=30)
"""The followers wait while the first process makes the checks."""


class Ranks:
    """The processes of a run, which :func:`torch.distributed.init_process_group` has connected."""

    def __init__(self) -> None:
        self.count, self.rank = dist.get_world_size(), dist.get_rank()
        # Objects are sent through the hosts' memory, whatever connects the devices.
        self._group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)

    def lead(
        self, evaluation: "Evaluation", networks: Networks, name: str, chunks: Sequence[Tensor]
    ) -> Iterator[ChunkResult]:
        """In the first process: the results of the attack ``name`` on ``chunks``, in their order."""
        for begin in range(0, len(chunks), self.count):
            some = chunks[begin : begin + self.count]
            self._told((name, [chunk.cpu() for chunk in some]))
            found: list[Any] = [None] * self.count
            dist.gather_object(_outcome(evaluation, networks, name, some[0]), found, group=self._group)
            for result in found[: len(some)]:
                if isinstance(result, BaseException):
                    raise result
                yield replace(result, x_adv=result.x_adv.to(evaluation.images.y.device))

    def end(self) -> None:
        """In the first process: let the others go."""
        self._told(None)

    def follow(self, evaluation: "Evaluation") -> None:
        """In any other process: attack chunks until the first says that it is done."""
        evaluation.network.eval().requires_grad_(False)
        networks: Networks | None = None
        while (task := self._told(None)) is not None:
            name, chunks = task
            networks = networks or Networks.of(evaluation)
            mine = chunks[self.rank] if self.rank < len(chunks) else None
            device = evaluation.images.y.device
            result = None if mine is None else _outcome(evaluation, networks, name, mine.to(device))
            dist.gather_object(result, None, group=self._group)

    def _told(self, task: Any) -> Any:
        """What the first process says."""
        said = [task]
        dist.broadcast_object_list(said, src=0, group=self._group)
        return said[0]


def _outcome(evaluation: "Evaluation", networks: Networks, name: str, chunk: Tensor) -> ChunkResult | Exception:
    """The result for the first process, or the error."""
    try:
        result = attack_chunk(evaluation, networks, name, chunk)
    except Exception as error:  # the first process raises it
        return error
    return replace(result, x_adv=result.x_adv.cpu())
