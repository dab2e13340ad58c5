"""Parts of a network whose gradient cannot be followed: found, tried, and named.

Under :class:`~kwta_exp.attacks.relaxing.Relaxing` torch's operators pass a gradient. A custom autograd
function, NumPy, compiled code and a value that is detached can still hide one. A module that holds such code is
suspected. It is cleared if its gradient tells how its output changes; otherwise a secant takes the gradient's
place, where the output has the input's shape; and what is left is named.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kwta_exp.activations.soft_gate import standard_deviation
from kwta_exp.attacks.relaxing.mode import Relaxing, of_each_image, soft_value, unseen

WIDTHS = (0.125, 0.25, 0.375, 0.5)
"""How far a secant reaches to each side, in standard deviations of the input: one pair of calls for each."""

SMALL = 0.1
"""How far the test of a gradient steps, in standard deviations of the input."""

AGREES = 0.2
"""The share of the change that a gradient may miss."""

DIRECTIONS = 8

_OURS = ("kwta_exp.", "torch.")
"""Custom autograd functions in these packages are known."""


@dataclass
class Suspect:
    """A module that holds code with a gradient that cannot be followed.

    Attributes:
        name: its dotted name.
        module: the module.
        why: what hides the gradient, such as ``"NumPy"``.
        x: its first input, without a graph.
        has_one_input: whether it takes that input alone and returns one tensor.
    """

    name: str
    module: nn.Module
    why: str
    x: Tensor | None
    has_one_input: bool

    @property
    def can_be_smoothed(self) -> bool:
        """Whether :func:`secant` can stand in for its gradient."""
        if self.x is None or not self.has_one_input:
            return False
        with torch.no_grad(), unseen():
            return bool(self.module(self.x).shape == self.x.shape)


@dataclass
class _Call:
    """A call of a module that has not returned yet."""

    module: nn.Module
    lost: int
    inputs: list[Tensor]
    why: list[str] = field(default_factory=list)
    child_is_suspect: bool = False


class Observer:
    """Watches one forward pass under a mode and suspects the innermost modules that hide gradients.

    Args:
        model: its modules are watched.
        known: modules with a relaxation of their own.
        mode: the active mode.
    """

    def __init__(self, model: nn.Module, known: set[nn.Module], mode: Relaxing) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.known = known
        self.mode = mode
        self.suspects: dict[nn.Module, Suspect] = {}
        self._stack: list[_Call] = []
        self._visited: set[Any] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every module, for one forward pass."""
        handles = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(self._before))
            handles.append(module.register_forward_hook(self._after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        floats = list(_floats(inputs))
        self._walk(floats)  # what made the inputs belongs to the module that calls this one
        self._stack.append(_Call(module, self.mode.lost.total(), floats))

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = list(_floats((output,)))
        self._walk(outputs)
        call = self._stack.pop()
        why = list(call.why)
        takes_gradient = any(each.requires_grad for each in call.inputs)
        if self.mode.lost.total() > call.lost and not call.child_is_suspect:
            why.append("values leave torch")
        if takes_gradient and _is_compiled(module):
            why.append("compiled")
        blocked = outputs and not any(each.requires_grad or soft_value(each) is not None for each in outputs)
        if takes_gradient and blocked and not call.child_is_suspect:
            why.append("no gradient")
        if module in self.known:
            return
        if why:
            one = len(inputs) == 1 and len(call.inputs) == 1 and isinstance(output, Tensor)
            x = call.inputs[0].detach() if call.inputs else None
            self.suspects[module] = Suspect(self.names[module], module, ", ".join(why), x, one)
        if self._stack:
            self._stack[-1].child_is_suspect |= bool(why) or call.child_is_suspect

    def _walk(self, tensors: list[Tensor]) -> None:
        """Custom autograd functions on the way to these tensors belong to the module that runs now."""
        pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        while pending:
            node: Any = pending.pop()
            if node is None or node in self._visited:
                continue
            self._visited.add(node)
            function = getattr(node, "_forward_cls", None)
            if function is not None and _is_foreign(function) and self._stack:
                self._stack[-1].why.append(f"autograd.Function {function.__name__}")
            pending += [parent for parent, _ in node.next_functions]


def _is_foreign(function: type) -> bool:
    """Whether a custom autograd function, or a custom operator, is neither torch's nor this project's."""
    if function.__name__.startswith("GeneratedBackwardFor"):  # of an operator made with torch.library
        return "kwta_exp" not in function.__name__
    return not function.__module__.startswith(_OURS)


def _floats(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, tuple | list):
        for each in values:
            yield from _floats(each)
    elif isinstance(values, dict):
        yield from _floats(list(values.values()))


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod")


def gradient_agrees(module: nn.Module, x: Tensor) -> bool:
    """Whether the gradient of ``module`` tells how its output changes, up to :data:`AGREES` of the change.

    For random weights w of the outputs and random directions u: ``<w, m(x + h u) - m(x - h u)> / 2h`` against
    ``<grad <w, m(x)>, u>``.
    """
    generator = torch.Generator().manual_seed(0)

    def signs(like: Tensor) -> Tensor:
        drawn = torch.randint(0, 2, like.shape, generator=generator)
        return (2 * drawn - 1).to(like)

    with unseen(), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        out = module(leaf)
        if not isinstance(out, Tensor) or not out.requires_grad:
            return False
        step = SMALL * standard_deviation(leaf.detach(), of_each_image(leaf))
        missed = total = 0.0
        for _ in range(DIRECTIONS):
            w, u = signs(out.detach()), signs(leaf.detach())
            (gradient,) = torch.autograd.grad((out * w).sum(), leaf, retain_graph=True, allow_unused=True)
            told = torch.zeros_like(leaf) if gradient is None else gradient
            with torch.no_grad():
                change = (module(leaf + step * u) - module(leaf - step * u)) * w / 2
            each_change = change.flatten(1).double().sum(1)
            each_told = (told * u * step).flatten(1).double().sum(1)
            missed += float((each_change - each_told).abs().sum())
            total += float(torch.maximum(each_change.abs(), each_told.abs()).sum())
    return missed <= AGREES * total


@torch.no_grad()
def secant(module: nn.Module, x: Tensor) -> Tensor:
    """The slope of each output value along its own input value, over distances of :data:`WIDTHS`.

    The mean of ``(m(x + h s) - m(x - h s)) s / 2h`` with random signs s: exact where ``m`` takes each value for
    itself, and with noise of mean 0 elsewhere. The signs are the same for all images and calls.

    Args:
        module: returns a tensor of its input's shape.
        x: its input ``(N, ...)``.
    """
    deviation = standard_deviation(x, of_each_image(x))
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros_like(x)
    for width in WIDTHS:
        signs = (2 * torch.randint(0, 2, x.shape[1:], generator=generator) - 1).to(x)
        reach = width * deviation
        total += (module(x + reach * signs) - module(x - reach * signs)) * signs / (2 * reach)
    return total / len(WIDTHS)
