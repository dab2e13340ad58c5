"""Groups of images that share a batch: when images of one are done, the next group takes their place.

An attack that can be run so is written as a generator, which asks for logits or gradients and is sent them;
whether other images were in the batch is nothing to it.
"""

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Query(NamedTuple):
    """Images ``x`` whose logits are wanted; with a ``loss`` of these, its gradient by ``x`` as well.

    What is ``told`` of each image, ``(n,)``, is the model's second argument: all of an attack's queries with a
    loss have it, or none.
    """

    x: Tensor
    loss: Callable[[Tensor], Tensor] | None = None
    told: Tensor | None = None


class Answer(NamedTuple):
    """Gradients like the images, logits ``(n, K)``, losses ``(n,)``, detached; empty where not asked for."""

    gradient: Tensor
    logits: Tensor
    value: Tensor


Climb = Generator[Query, Answer, None]
"""What attacks one group, until it is done."""


def together(
    model: Callable[..., Tensor],
    climb: Callable[[Tensor], Climb],
    positions: Tensor,
    max_batch_size: int | None,
) -> None:
    """Run ``climb`` on all ``positions``, group by group.

    Args:
        model: images to logits; with a second argument where a query has one.
        climb: begins the attack on the images at some positions.
        positions: int64 ``(n,)``.
        max_batch_size: the most images in a batch. A group begins whenever a quarter of it is free. ``None``:
            all images are one group.
    """
    max_batch_size = max_batch_size or max(1, len(positions))
    waiting = positions
    running: list[tuple[Climb, Query]] = []
    while running or len(waiting):
        room = max_batch_size - sum(len(query.x) for _, query in running)
        if len(waiting) and 4 * room >= max_batch_size:
            begun, waiting = climb(waiting[:room]), waiting[room:]
            running.append((begun, next(begun)))
        asking = [each for each in running if each[1].loss is None]  # mostly it is their last, and makes room
        running, asking = (
            ([each for each in running if each[1].loss is not None], asking) if asking else ([], running)
        )
        for (group, _), answer in zip(asking, answers(model, [query for _, query in asking]), strict=True):
            try:
                running.append((group, group.send(answer)))
            except StopIteration:
                continue


def answers(model: Callable[..., Tensor], queries: Sequence[Query]) -> list[Answer]:
    """The answers to ``queries``, either all with a loss or all without."""
    sizes = [len(query.x) for query in queries]
    x = _joined([query.x for query in queries])
    told = [query.told for query in queries if query.told is not None]
    aside = [_joined(told)] if told else []
    losses = [query.loss for query in queries if query.loss is not None]
    if not losses:
        with torch.no_grad():
            logits = model(x, *aside)
        return [Answer(some[:0], some, some[:0, 0]) for some in logits.split(sizes)]

    def value_of(logits: Tensor) -> Tensor:
        return _joined([loss(some) for loss, some in zip(losses, logits.split(sizes), strict=True)])

    parts = (each.split(sizes) for each in input_gradient(lambda x: model(x, *aside), x, value_of))
    return [Answer(*each) for each in zip(*parts, strict=True)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def input_gradient(
    model: Callable[[Tensor], Tensor], x: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss's gradient with respect to the input alone, the logits, and the loss ``(N,)``."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        value = loss(logits)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return gradient, logits.detach(), value.detach()


def micro_batched(model: Callable[[Tensor], Tensor], max_batch_size: int | None) -> Callable[[Tensor], Tensor]:
    """``model``, shown at most ``max_batch_size`` images at a time; fewer once a GPU ran out of memory."""
    most = max_batch_size

    def ask(x: Tensor) -> Tensor:
        nonlocal most
        parts: list[Tensor] = []
        done = 0
        while done < len(x) or not parts:
            some = x[done : done + (most or len(x))]
            try:
                parts.append(model(some))
            except torch.OutOfMemoryError:
                if len(some) < 2:
                    raise
                most = (len(some) + 1) // 2
                continue
            done += max(1, len(some))
        return _joined(parts)

    return ask


def refills(attack: object) -> bool:
    """Whether ``attack`` takes more images than a batch holds; see :class:`~kwta_exp.attacks.Attack`."""
    return getattr(attack, "refills", False) is True
