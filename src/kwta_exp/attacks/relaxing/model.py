"""A model whose gradients go through smooth stand-ins, while its outputs stay its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kwta_exp.attacks.base import forward_is_exact
from kwta_exp.attacks.relaxing.mode import Relaxing, StraightThrough, unseen
from kwta_exp.attacks.relaxing.opaque import Observer, gradient_agrees, secant
from kwta_exp.randomness import isolated

Relaxation = Callable[[Any, Tensor, float], Tensor]
"""``relaxation(module, x, temperature)``: a smooth function near ``module(x)``."""

Layers = Sequence[tuple[nn.Module, Relaxation]]
"""Modules, each with its relaxation."""


@dataclass
class Found:
    """What stands in the way of a network's gradients, and what is done about it.

    Attributes:
        layers: how many modules have a relaxation of their own.
        operators: how many calls of operators are relaxed in a forward pass, by kind.
        smoothed: modules whose gradient is replaced by a secant, and why.
        not_covered: modules whose gradient hides something and cannot be replaced, and why.
    """

    layers: int = 0
    operators: dict[str, int] = field(default_factory=dict)
    smoothed: dict[str, str] = field(default_factory=dict)
    not_covered: dict[str, str] = field(default_factory=dict)

    @property
    def hard(self) -> int:
        """How many layers, modules and operators give discrete answers, where a gradient sees no change."""
        kinds = ("comparison", "selection", "rounding", "sign", "cast")
        return self.layers + len(self.smoothed) + sum(self.operators.get(kind, 0) for kind in kinds)


class RelaxedModel(nn.Module):
    """Calls with a gradient go through stand-ins; calls without one are the model's own.

    The first call with a gradient looks for what has to be relaxed. Where there is nothing, later calls are the
    model's own too.

    Args:
        model: images to logits.
        layers: modules with their relaxations.
        operators: relax torch's operators too, and modules whose gradient hides something.
        exact_forward: compute the model itself forward; otherwise the stand-ins, where they are floats.

    Attributes:
        temperature: of the stand-ins.
        relaxes: whether anything is or may be relaxed; known after the first call with a gradient.
    """

    def __init__(self, model: nn.Module, layers: Layers, operators: bool, exact_forward: bool = True) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.temperature = 0.1
        self.exact_forward = exact_forward
        self.relaxes = bool(layers)
        self._operators = operators
        self._smoothed: list[nn.Module] = []
        self._looked = not operators
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.exact_forward and not torch.is_grad_enabled():
            return self._exactly(x)
        if not self._looked:
            return self._look(x)
        stand_ins = [*self.layers, *((module, _by_secant) for module in self._smoothed)]
        mode = Relaxing(self.temperature, self.exact_forward) if self._operators else nullcontext()
        with relaxed(stand_ins, self.temperature, self.exact_forward), mode:
            return self._exactly(x)

    def _exactly(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits

    def _look(self, x: Tensor) -> Tensor:
        """The first call: its gradient does without the modules that it finds."""
        mode = Relaxing(self.temperature, self.exact_forward)
        observer = Observer(self.model, {module for module, _ in self.layers}, mode)
        with relaxed(self.layers, self.temperature, self.exact_forward), mode, observer.watching():
            logits: Tensor = self.model(x)
        self._smoothed, _ = judged(observer)
        self._operators = mode.relaxes
        self._looked = True
        self.relaxes |= mode.relaxes or bool(observer.suspects)
        return logits


def examined(model: nn.Module, layers: Layers, x: Tensor, temperature: float = 0.1) -> Found:
    """What of ``model`` is relaxed on its way from a few images ``x`` in [0, 1] to logits.

    Its random numbers disturb no others.
    """
    with isolated(0), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        observer = Observer(model, {module for module, _ in layers}, Relaxing(temperature))
        with relaxed(layers, temperature), observer.mode, observer.watching():
            model(leaf)
        smoothed, not_covered = judged(observer)
        mode = Relaxing(temperature)
        stand_ins = [*layers, *((module, _by_secant) for module in smoothed)]
        with relaxed(stand_ins, temperature), mode:
            model(leaf)
    why = {suspect.name or "the network": suspect.why for suspect in observer.suspects.values()}
    names = [observer.suspects[module].name or "the network" for module in smoothed]
    return Found(
        len(layers), dict(mode.relaxed), {name: why[name] for name in names},
        {name: why[name] for name in not_covered},
    )  # fmt: skip


def judged(observer: Observer) -> tuple[list[nn.Module], list[str]]:
    """Of the suspected modules: those to smooth, and the names of those that are not covered."""
    smoothed, not_covered = [], []
    with isolated(0):
        for suspect in observer.suspects.values():
            if suspect.x is not None and suspect.has_one_input and gradient_agrees(suspect.module, suspect.x):
                continue
            if suspect.can_be_smoothed:
                smoothed.append(suspect.module)
            else:
                not_covered.append(suspect.name or "the network")
    return smoothed, not_covered


def _by_secant(module: nn.Module, x: Tensor, temperature: float) -> Tensor:
    return x * secant(module, x.detach())


@contextmanager
def relaxed(layers: Layers, temperature: float, exact_forward: bool = True) -> Iterator[None]:
    """Differentiate the relaxations of ``layers``; without ``exact_forward``, compute them forward too.

    What happens inside the layers is no business of an active :class:`Relaxing`.
    """
    with ExitStack() as stack:
        for module, relaxation in layers:
            stack.enter_context(_replaced(module, relaxation, temperature, exact_forward))
        token = forward_is_exact.set(exact_forward)
        stack.callback(forward_is_exact.reset, token)
        yield


@contextmanager
def _replaced(module: nn.Module, relaxation: Relaxation, temperature: float, exact: bool) -> Iterator[None]:
    """``module`` computes its relaxation in place of its gradient, and is itself again afterwards."""
    inside = False

    def stand_in(own: Callable[[], Tensor], x: Tensor) -> Tensor:
        nonlocal inside
        if inside or (exact and not torch.is_grad_enabled()):
            return own()
        inside = True  # a relaxation may call the module itself
        try:
            with unseen():
                soft = relaxation(module, x, temperature)
                if not exact:
                    return soft
                with torch.no_grad():
                    output = own()
                passed: Tensor = StraightThrough.apply(output, soft)
                return passed
        finally:
            inside = False

    if isinstance(module, torch.jit.ScriptModule):  # its forward cannot be replaced
        handle = module.register_forward_hook(lambda _, inputs, output: stand_in(lambda: output, inputs[0]))
        try:
            yield
        finally:
            handle.remove()
        return
    forward: Callable[..., Tensor] = module.forward
    had_one = "forward" in vars(module)
    module.forward = lambda *inputs, **named: stand_in(lambda: forward(*inputs, **named), inputs[0])
    try:
        yield
    finally:
        if had_one:
            module.forward = forward
        else:
            del module.forward
