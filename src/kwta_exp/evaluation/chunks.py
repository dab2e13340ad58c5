"""One chunk of images under one attack, in this process or in others."""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from kwta_exp.attacks import Attack, Threat
from kwta_exp.attacks.losses import margin
from kwta_exp.attacks.together import micro_batched, refills
from kwta_exp.data.batches import Split, to_float
from kwta_exp.errors import UserError
from kwta_exp.evaluation.judge import Judge, misclassified, predicted
from kwta_exp.evaluation.query_counter import QueryCounter
from kwta_exp.evaluation.records import Column
from kwta_exp.models.proxy import proxy_for
from kwta_exp.randomness import fold, isolated, key
from kwta_exp.storage import image_digests


@dataclass(frozen=True)
class Task:
    """What every chunk of an evaluation shares; see :func:`~kwta_exp.evaluation.evaluate`."""

    network: nn.Module
    images: Split
    suite: Mapping[str, Attack]
    threat: Threat
    seed: int
    batch_size: int
    fast_search: bool = False


@dataclass(frozen=True)
class Bench:
    """What one process works with: the judge, and the network that attacks see."""

    judge: Judge
    searched: nn.Module

    @classmethod
    def of(cls, task: Task) -> Self:
        judge = Judge(task.network, task.batch_size)
        if not task.fast_search:
            return cls(judge, judge.network)
        some = torch.arange(min(2, len(task.images)), device=task.images.y.device)
        return cls(judge, proxy_for(task.network, to_float(task.images.x[some])))


@dataclass(frozen=True)
class Outcome:
    """The rows of one chunk, the adversarial images, and what it cost."""

    rows: dict[str, Column]
    x_adv: Tensor
    forwards: int
    backwards: int
    seconds: float


def attacked(task: Task, bench: Bench, name: str, chunk: Tensor) -> Outcome:
    """Attack the images at positions ``chunk`` with the attack called ``name`` and judge what it returns.

    Where the attack searched with a proxy and fooled that alone (at any time: it may have left off), the
    image is attacked again, on the network itself: a success that was no success must not end a search.

    Raises:
        NotApplicableError: from the attack.
        UserError: if the attack fails or returns something other than images, naming it.
    """
    outcome, ended = _attacked(task, bench.judge, bench.searched, name, chunk)
    withstood = torch.from_numpy(np.flatnonzero(~outcome.rows["fooled"])).to(chunk.device)
    if bench.searched is bench.judge.network or not len(withstood):
        return outcome
    asked = micro_batched(bench.searched, task.batch_size)
    with torch.no_grad(), isolated(key(task.seed, "claimed", name, int(chunk[0]))):
        ended = ended[withstood] | misclassified(
            asked(outcome.x_adv[withstood]), task.images.y[chunk[withstood]]
        )
    again = withstood[ended]
    if not len(again):
        return outcome
    second, _ = _attacked(task, bench.judge, bench.judge.network, name, chunk[again])
    at = again.cpu().numpy()
    for column in ("queries", "steps"):
        second.rows[column] += outcome.rows[column][at]
    for column, values in second.rows.items():
        outcome.rows[column][at] = values
    outcome.x_adv[again] = second.x_adv
    return Outcome(
        outcome.rows, outcome.x_adv, outcome.forwards + second.forwards,
        outcome.backwards + second.backwards, outcome.seconds + second.seconds,
    )  # fmt: skip


def _attacked(
    task: Task, judge: Judge, searched: nn.Module, name: str, chunk: Tensor
) -> tuple[Outcome, Tensor]:
    """The outcome, and for which images the attack saw ``searched`` err inside the threat."""
    images, threat = task.images, task.threat
    x, y = to_float(images.x[chunk]), images.y[chunk]
    keys = fold(key(task.seed, "attack", name), images.index[chunk])
    counted = QueryCounter(searched, x, y, threat)
    started = time.monotonic()
    try:
        with isolated(int(keys.sum())):  # whatever draws from global generators does so reproducibly
            attack = task.suite[name]
            limit = {"max_batch_size": task.batch_size} if refills(attack) else {}
            returned = attack(counted, x.clone(), y, keys, **limit)
        if not isinstance(returned, Tensor) or returned.shape != x.shape:
            raise ValueError(
                f"returned {getattr(returned, 'shape', type(returned).__name__)};"
                f" expected images {tuple(x.shape)}"
            )
    except (ValueError, TypeError, RuntimeError, LookupError, AssertionError) as error:
        raise UserError(f"attack.{name}: {type(error).__name__}: {error}") from error

    with torch.no_grad(), isolated(~int(keys.sum())):  # some networks draw random numbers
        x_adv = returned.detach().to(x)
        x_adv = threat.project(torch.where(x_adv.isfinite(), x_adv, x), x)
        logits = judge.logits(x_adv)
        erred = misclassified(logits, y)
        fooled = erred.clone()
        fooled[erred] = judge.confirmed(x_adv[erred], y[erred])
        rows = {
            **rows_of(images, chunk, logits),
            "fooled": fooled.cpu().numpy(),
            "unconfirmed": (erred & ~fooled).cpu().numpy(),
            "distance": threat.distance(x_adv, x).cpu().numpy(),
            "queries": counted.queries.cpu().numpy(),
            "steps": counted.steps.cpu().numpy(),
            "key": keys.cpu().numpy(),
        }
    seconds = time.monotonic() - started
    return Outcome(rows, x_adv, counted.forwards, counted.backwards, seconds), counted.seen_to_err


def rows_of(images: Split, chunk: Tensor, logits: Tensor) -> dict[str, Column]:
    """Who the images of a chunk are and what ``logits`` make of them."""
    labels = images.y[chunk]
    return {
        "index": images.index[chunk].cpu().numpy(),
        "digest": image_digests(images.x[chunk].cpu().numpy()),
        "label": labels.cpu().numpy(),
        "prediction": predicted(logits).cpu().numpy(),
        "margin": -margin(logits, labels).cpu().numpy(),
    }


class Workers:
    """Does chunks one after another, or several at once in processes of their own; outcomes are the same.

    Processes are started with "spawn" and get the task once. They use as many threads each as this one.

    Args:
        task: what to do.
        bench: of this process.
        processes: how many; with 1 the work is done here.

    Raises:
        UserError: for several processes with a network or attack that cannot be sent to one, or off the CPU.
    """

    def __init__(self, task: Task, bench: Bench, processes: int) -> None:
        self._task, self._bench, self._processes = task, bench, processes
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1 and task.images.y.device.type != "cpu":
            raise UserError(
                f"evaluation.processes={processes}: several processes are for CPUs; expected 1 on a GPU"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error is None, cancel_futures=True)

    def outcomes(self, name: str, chunks: Sequence[Tensor]) -> Iterator[Outcome]:
        """The outcomes of ``chunks`` in their order."""
        if self._processes == 1 or len(chunks) < 2:
            for chunk in chunks:
                yield attacked(self._task, self._bench, name, chunk)
            return
        pool = self._started()
        waiting: deque[Future[Outcome]] = deque()
        left = iter(chunks)
        try:
            while True:
                for chunk in islice(left, 2 * self._processes - len(waiting)):
                    with _interrupts_held():
                        waiting.append(pool.submit(_do, name, chunk))
                if not waiting:
                    return
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"evaluation.processes={self._processes}: a process died, for want of memory perhaps;"
                " expected fewer. The same command continues"
            ) from error
        finally:
            for future in waiting:
                future.cancel()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._processes,
                multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(_pickled(self._task), torch.get_num_threads(), os.getpid()),
            )
        return self._pool


_here: dict[str, Any] = {}
"""The task and bench of a worker process."""


def _pickled(task: Task) -> bytes:
    import pickle

    try:
        return pickle.dumps(task)
    except Exception as error:  # pickling fails in any way whatever
        raise UserError(
            f"evaluation.processes: the network or an attack cannot be sent to another process ({error});"
            " expected 1"
        ) from error


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """For starting processes: until they have begun, Ctrl-C waits, or each would print a traceback."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _begin(pickled: bytes, threads: int, parent: int) -> None:
    import pickle

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process without a word
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(threads)
    task: Task = pickle.loads(pickled)
    _here.update(task=task, bench=Bench.of(task), parent=parent)


def _do(name: str, chunk: Tensor) -> Outcome:
    if os.getppid() != _here["parent"]:  # it was killed: nobody will read this
        os._exit(1)
    return attacked(_here["task"], _here["bench"], name, chunk)
