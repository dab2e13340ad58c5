"""The cost of a suite, announced before it starts, and a cap on it."""

import logging
import time
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from kwta_exp.attacks import Attack
from kwta_exp.attacks.base import MaxQueries
from kwta_exp.failures import is_of_the_machine, is_out_of_memory

log = logging.getLogger(__name__)

MIN_SECONDS = 20.0
"""A suite that takes less is not announced."""


def forecast(suite: Mapping[str, Attack], images: int, classes: int, draws: int = 1) -> dict[str, MaxQueries]:
    """The most passes of each attack if no image is fooled; attacks of unknown cost are left out.

    Args:
        suite: attacks by name.
        images: how many are attacked.
        classes: that the network knows.
        draws: passes that one answer of a random network takes.
    """
    found = {}
    for name, attack in suite.items():
        most, passes = attack.max_queries(classes), images * (1 if attack.sees_single_answers else draws)
        if most is not None:
            found[name] = MaxQueries(passes * most.forward, passes * most.backward)
    return found


def within_budget(
    suite: Mapping[str, Attack], images: int, classes: int, budget: int | None, draws: int = 1
) -> dict[str, str]:
    """The attacks that do not fit into ``budget`` passes, in the suite's order, with the reason."""
    left_out: dict[str, str] = {}
    if budget is None:
        return left_out
    left = budget
    for name, passes in forecast(suite, images, classes, draws).items():
        if sum(passes) > left:
            left_out[name] = (
                f"left out: up to {sum(passes):,} passes, of which evaluation.budget={budget} leaves {left:,}"
            )
        else:
            left -= sum(passes)
    return left_out


def announce(
    suite: Mapping[str, Attack],
    left_out: Mapping[str, str],
    network: nn.Module,
    sample: Tensor,
    images: int,
    classes: int,
) -> None:
    """Log the largest cost of the suite in passes, and in time at the speed measured on ``sample``."""
    for name, why in left_out.items():
        log.warning("%s is %s", name, why)
    runs = {name: attack for name, attack in suite.items() if name not in left_out}
    draws = int(getattr(network, "draws", 1))
    costs = forecast(runs, images, classes, draws)
    if not sum(map(sum, costs.values())):
        return
    forward, backward = _seconds_a_pass(network, sample)
    seconds = {name: (f * forward + b * backward) / draws for name, (f, b) in costs.items()}
    if sum(seconds.values()) < MIN_SECONDS:
        return
    slowest = max(seconds, key=seconds.__getitem__)
    log.info(
        "attacking %d images: at most %s forward and %s backward passes,"
        " %s if no image is fooled (%s alone: %s)%s",
        images,
        f"{sum(f for f, _ in costs.values()):,}",
        f"{sum(b for _, b in costs.values()):,}",
        _span(sum(seconds.values())),
        slowest,
        _span(seconds[slowest]),
        _unknown([name for name in runs if name not in costs]),
    )


def _unknown(names: Collection[str]) -> str:
    return f"; no forecast for {', '.join(names)}" if names else ""


def _seconds_a_pass(network: nn.Module, sample: Tensor) -> tuple[float, float]:
    """Seconds of one image, forward and backward, after a warm-up; (0, 0) if that fails, as without gradients.

    A failure is for the attacks to report, except that of a GPU, after which nothing works. When memory runs
    out, fewer images are measured.
    """
    x = sample.clone().requires_grad_()
    try:
        torch.autograd.grad(network(x).sum(), x)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            if is_of_the_machine(error):
                raise
            return 0.0, 0.0
    else:
        return _timed(network, x)
    fewer = sample[: len(sample) // 2]
    return _seconds_a_pass(network, fewer) if len(fewer) else (0.0, 0.0)


def _timed(network: nn.Module, x: Tensor) -> tuple[float, float]:
    _wait(x)
    started = time.monotonic()
    logits = network(x)
    _wait(x)
    between = time.monotonic()
    torch.autograd.grad(logits.sum(), x)
    _wait(x)
    return (between - started) / len(x), (time.monotonic() - between) / len(x)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
