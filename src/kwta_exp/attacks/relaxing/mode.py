"""The mode, and what its rules share."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kwta_exp.activations.soft_gate import TINY, standard_deviation

Arguments = tuple[Any, ...]
Rule = Callable[["Relaxing", Callable[..., Any], Arguments, dict[str, Any]], Any]
"""``(mode, function, arguments, keywords)`` to what the function returns."""

RULES: dict[str, Rule] = {}
"""The rules by the name of the function; see :func:`rule`."""

SOFT, SOURCE, CHOICE = "_kwta_exp_soft", "_kwta_exp_source", "_kwta_exp_choice"
"""Attributes of tensors: the soft value; what was detached; which values an index stands for."""


FEW = 16
"""Fewer competitors than this are too few for a standard deviation of their own."""


class Relaxing(TorchFunctionMode):
    """While it is active, operators pass gradients that they do not pass by themselves.

    Args:
        temperature: width of the stand-ins, as a multiple of the standard deviation of the values that compete.
        exact_forward: compute the operators themselves forward; else their stand-ins, where these are floats.

    Attributes:
        relaxed: how many calls of each kind were relaxed.
        squashings: how many squashings were looked at, saturated or not.
        lost: how many calls gave values away to where no gradient can follow, such as NumPy.
        paused: above 0, every operator is left alone.
    """

    def __init__(self, temperature: float, exact_forward: bool = True) -> None:
        super().__init__()
        self.temperature = temperature
        self.exact_forward = exact_forward
        self.relaxed: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.squashings = 0
        self.paused = 0

    def __enter__(self) -> "Relaxing":
        self._token = _active.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _active.reset(self._token)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @property
    def relaxes(self) -> bool:
        """Whether it met an operator that it relaxes, or would if it were saturated."""
        return bool(self.relaxed) or self.squashings > 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        rule = None if self.paused else _rule_of(func)
        if rule is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        return rule(self, func, args, dict(kwargs or {}))

    def passed(self, exact: Tensor, soft: Tensor) -> Tensor:
        """``exact`` with the gradient of ``soft``; booleans and integers get it as their soft value."""
        if exact.is_floating_point():
            if not self.exact_forward:
                return soft.to(exact.dtype)
            with torch.enable_grad():
                passed: Tensor = StraightThrough.apply(exact.detach(), soft.to(exact.dtype))
            setattr(passed, SOFT, soft)
            return passed
        setattr(exact, SOFT, soft)
        return exact

    def gate(self, difference: Tensor, like: Tensor, dims: Sequence[int]) -> Tensor:
        """The sigmoid of ``difference`` over the :meth:`width` for ``like``, which compete over ``dims``."""
        return torch.sigmoid(difference / self.width(like, dims))

    def width(self, values: Tensor, dims: Sequence[int]) -> Tensor:
        """The temperature times the standard deviation of the ``values`` over ``dims``.

        Where few compete, that of the whole image: two rivals are always as far apart as their own deviation
        says, so their gate would never be half open.
        """
        few = math.prod(values.shape[dim] for dim in dims) < FEW
        return self.temperature * standard_deviation(values, of_each_image(values) if few else dims)

    def membership(self, values: Tensor, threshold: Tensor, sign: int, dims: Sequence[int]) -> Tensor:
        """:class:`Membership` of ``values`` on the side ``sign`` of the ``threshold``, a rank of them."""
        member: Tensor = Membership.apply(values, threshold.detach(), self.width(values, dims), sign, dims)
        return member


_active: ContextVar["Relaxing | None"] = ContextVar("_active", default=None)


@contextmanager
def unseen() -> Iterator[None]:
    """Code in here is no part of the network: an active :class:`Relaxing` leaves its operators alone."""
    mode = _active.get()
    if mode is None:
        yield
        return
    mode.paused += 1
    try:
        yield
    finally:
        mode.paused -= 1


class StraightThrough(torch.autograd.Function):
    """Forward the first argument, backward to the second."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, soft: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class Membership(torch.autograd.Function):
    """``sigmoid(sign * (values - threshold) / width)``; the threshold is a rank of the values over ``dims``.

    It moves as that of :func:`~kwta_exp.activations.soft_gate.moving_threshold`. Only the gates are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, threshold: Tensor, width: Tensor, sign: int, dims: Sequence[int]
    ) -> Tensor:
        gates = torch.sigmoid(sign * (values - threshold) / width)
        ctx.save_for_backward(gates, width)
        ctx.sign, ctx.dims = sign, tuple(dims)
        return gates

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        gates, width = ctx.saved_tensors
        share = gates * (1 - gates)
        moves = (gradient * share).sum(ctx.dims, keepdim=True)
        mean = moves / share.sum(ctx.dims, keepdim=True).clamp_min(TINY)
        return (gradient - mean) * share * (ctx.sign / width), None, None, None, None


@dataclass(frozen=True)
class Choice:
    """What an index stands for: the largest (or smallest) values of ``source`` along ``dim``.

    Attributes:
        source: the values, with a graph.
        dim: along which they compete.
        sign: 1 for the largest, -1 for the smallest.
        ranked: the chosen values in order of rank, the last one is the threshold.
        keepdim: whether the index has the dimension ``dim``.
    """

    source: Tensor
    dim: int
    sign: int
    ranked: Tensor
    keepdim: bool = True

    def membership(self, mode: Relaxing) -> Tensor:
        """How far each value of the source is among the chosen ones, from 0 to 1, in the source's shape."""
        return mode.membership(self.source, self.ranked.narrow(self.dim, -1, 1), self.sign, [self.dim])


def soft_value(value: Any) -> Tensor | None:
    """The soft value of a tensor, if it has one."""
    return getattr(value, SOFT, None) if isinstance(value, Tensor) else None


def graph_of(value: Any) -> Tensor | None:
    """What a gradient by ``value`` can go to: its soft value, itself, or what it was detached from."""
    if not isinstance(value, Tensor):
        return None
    soft = soft_value(value)
    if soft is not None:
        return soft
    if value.requires_grad and value.is_floating_point():
        return value
    return getattr(value, SOURCE, None)


def exactly(func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """The operator itself, without a graph."""
    with torch.no_grad():
        return func(*args, **kwargs)


def broadcast_dims(wide: Any, other: Any) -> list[int]:
    """The dimensions along which ``other`` is one value for all of ``wide``: the values there compete."""
    if not isinstance(wide, Tensor) or not isinstance(other, Tensor) or other.dim() != wide.dim():
        return []
    sizes = zip(wide.shape, other.shape, other.stride(), strict=True)
    return [dim for dim, (size, own, stride) in enumerate(sizes) if size > 1 and (own == 1 or stride == 0)]


def rank_dims(wide: Tensor, other: Any) -> list[int]:
    """The dimensions over which ``other`` is a rank of ``wide``: in every row, one of the values there.

    None where it is one value for all images: that is a constant, not a rank.
    """
    if not isinstance(other, Tensor) or other.dim() != wide.dim() or len(other) != len(wide):
        return []
    dims = broadcast_dims(wide, other)
    if not dims and other.shape == wide.shape and wide.dim() > 1:
        dims = of_each_image(wide)
        if not bool((other.amax(dims) == other.amin(dims)).all()):
            return []
    if not dims or 0 in dims:
        return []
    return dims if bool((wide == other).any(dims).all()) else []


def of_each_image(x: Tensor) -> list[int]:
    return list(range(1, x.dim())) if x.dim() > 1 else list(range(x.dim()))


def size_of(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 1


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of the functions with these names, such as ``"mul"``: a method's or torch's."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


_by_function: dict[Any, Rule | None] = {}


def _rule_of(func: Callable[..., Any]) -> Rule | None:
    """The rule of a function, found by its name once."""
    try:
        return _by_function[func]
    except KeyError:
        found = RULES.get(getattr(func, "__name__", ""))
        _by_function[func] = found
        return found
