"""What a suite may cost, said before it starts, and a cap on it."""

import logging
import time
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from kwta_exp.attacks import Attack

log = logging.getLogger(__name__)

WORTH_SAYING = 20.0
"""Seconds; a suite that takes less is begun without a word."""


def forecast(suite: Mapping[str, Attack], images: int, classes: int) -> dict[str, tuple[int, int] | None]:
    """The most passes, (forward, backward), that each attack may take for ``images`` that all withstand.

    ``None`` for an attack that does not say: it has no method ``passes(classes)``, or that returns ``None``.
    """
    found: dict[str, tuple[int, int] | None] = {}
    for name, attack in suite.items():
        each = attack.passes(classes) if hasattr(attack, "passes") else None
        found[name] = None if each is None else (images * each[0], images * each[1])
    return found


def within_budget(suite: Mapping[str, Attack], images: int, classes: int, budget: int | None) -> dict[str, str]:
    """The attacks that ``budget`` passes leave out, taken in the suite's order, and why."""
    left_out: dict[str, str] = {}
    if budget is None:
        return left_out
    left = budget
    for name, passes in forecast(suite, images, classes).items():
        if passes is None:
            continue
        if sum(passes) > left:
            left_out[name] = (
                f"left out: up to {sum(passes):,} passes do not fit into what evaluation.budget={budget}"
                f" leaves, {left:,}"
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
    """Log what the suite may cost in passes, and in time at the speed of two passes through ``sample``."""
    for name, why in left_out.items():
        log.warning("%s is %s", name, why)
    runs = {name: attack for name, attack in suite.items() if name not in left_out}
    known = forecast(runs, images, classes)
    costs = {name: passes for name, passes in known.items() if passes is not None}
    if not sum(map(sum, costs.values())):
        return
    forward, backward = _seconds_a_pass(network, sample)
    seconds = {name: f * forward + b * backward for name, (f, b) in costs.items()}
    if sum(seconds.values()) < WORTH_SAYING:
        return
    dearest = max(seconds, key=seconds.__getitem__)
    log.info(
        "attacking %d images: at most %s forward and %s backward passes,"
        " %s if every image withstands (%s alone: %s)%s",
        images,
        f"{sum(f for f, _ in costs.values()):,}",
        f"{sum(b for _, b in costs.values()):,}",
        _span(sum(seconds.values())),
        dearest,
        _span(seconds[dearest]),
        _unknown([name for name in runs if name not in costs]),
    )


def _unknown(names: Collection[str]) -> str:
    return f"; no forecast for {', '.join(names)}" if names else ""


def _seconds_a_pass(network: nn.Module, sample: Tensor) -> tuple[float, float]:
    """Of one image, forward and backward, measured after a pass to warm up; (0, 0) if there is no gradient."""
    x = sample.clone().requires_grad_()
    try:
        torch.autograd.grad(network(x).sum(), x)
    except RuntimeError:
        return 0.0, 0.0
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
