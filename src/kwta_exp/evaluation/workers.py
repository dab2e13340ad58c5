"""Chunks one after another, or several at once in processes of their own."""

import multiprocessing
import os
import pickle
import signal
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from kwta_exp.errors import UserError
from kwta_exp.evaluation.chunks import ChunkResult, Networks, attack_chunk, batch_size_for
from kwta_exp.evaluation.ranks import Ranks

if TYPE_CHECKING:
    from kwta_exp.evaluation.evaluation import Evaluation


class Workers:
    """Attacks chunks here, in ``evaluation.processes`` processes, or in those of the run; results are the same.

    Processes are started with "spawn" and receive the evaluation once. Each uses as many threads as this one.

    Args:
        evaluation: what to do.
        networks: of this process.
        ranks: the processes of the run, if there are several.

    Raises:
        UserError: for several processes with a network or attack that cannot be pickled, or off the CPU.
    """

    def __init__(self, evaluation: "Evaluation", networks: Networks, ranks: Ranks | None = None) -> None:
        self._evaluation, self._networks, self._ranks = evaluation, networks, ranks
        self._processes = evaluation.processes
        self._pool: ProcessPoolExecutor | None = None
        self._shared: Path | None = None
        if self._processes > 1 and evaluation.images.y.device.type != "cpu":
            raise UserError(
                f"evaluation.processes={self._processes}: several processes are for CPUs; expected 1 on a GPU"
            )

    @property
    def batch_size(self) -> int:
        """The most images in one call of an attack."""
        return batch_size_for(self._networks.searched, self._evaluation)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error is None, cancel_futures=True)
        if self._shared is not None:
            self._shared.unlink(missing_ok=True)

    def results(self, name: str, chunks: Sequence[Tensor]) -> Iterator[ChunkResult]:
        """The results of the attack ``name`` on ``chunks``, in their order."""
        if self._ranks is not None:
            yield from self._ranks.lead(self._evaluation, self._networks, name, chunks)
            return
        if self._processes == 1 or len(chunks) < 2:
            for chunk in chunks:
                yield attack_chunk(self._evaluation, self._networks, name, chunk)
            return
        pool = self._started()
        waiting: deque[Future[ChunkResult]] = deque()
        remaining = iter(chunks)
        try:
            while True:
                for chunk in islice(remaining, 2 * self._processes - len(waiting)):
                    waiting.append(_submitted(pool, name, chunk))
                if not waiting:
                    return
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"evaluation.processes={self._processes}: a process died, perhaps out of memory;"
                " expected fewer. The same command continues"
            ) from error
        finally:
            for future in waiting:
                future.cancel()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # In a file: arguments larger than a pipe's buffer would block this process for ever if the other
            # one died before it read them.
            self._shared = _in_a_file(_pickled(self._evaluation))
            self._pool = ProcessPoolExecutor(
                self._processes,
                multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(str(self._shared), torch.get_num_threads(), os.getpid()),
            )
        return self._pool


def _submitted(pool: ProcessPoolExecutor, name: str, chunk: Tensor) -> Future[ChunkResult]:
    try:
        with _interrupts_blocked():
            return pool.submit(_attack_chunk, name, chunk)
    except OSError as error:  # a process died while the next one started, or none can be started
        raise BrokenProcessPool(str(error)) from error


_here: dict[str, Any] = {}
"""The evaluation and networks of a worker process."""


def _pickled(evaluation: "Evaluation") -> bytes:
    try:
        return pickle.dumps(evaluation)
    except Exception as error:  # pickling fails with any exception
        raise UserError(
            f"evaluation.processes: the network or an attack cannot be pickled for another process ({error});"
            " expected 1"
        ) from error


def _in_a_file(content: bytes) -> Path:
    """A temporary file that only this user can read."""
    number, name = tempfile.mkstemp(prefix="kwta_exp-")
    with os.fdopen(number, "wb") as file:
        file.write(content)
    return Path(name)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C while processes start; otherwise each of them prints a traceback."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _begin(shared: str, threads: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process silently
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(threads)
    try:
        evaluation: Evaluation = pickle.loads(Path(shared).read_bytes())
    except FileNotFoundError:  # the parent has given up
        os._exit(1)
    _here.update(evaluation=evaluation, networks=Networks.of(evaluation), parent=parent)


def _attack_chunk(name: str, chunk: Tensor) -> ChunkResult:
    if os.getppid() != _here["parent"]:  # the parent was killed
        os._exit(1)
    return attack_chunk(_here["evaluation"], _here["networks"], name, chunk)
