"""Operators that pass no gradient, differentiated through a smooth function near them.

BPDA (Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018, section 4.1)
needs a smooth stand-in for what blocks the gradient. Here the stand-ins are those of torch's operators, so a
network needs no change and no module a name: under :class:`Relaxing`, a comparison, a rounding, a selection of
the largest values or a saturated squashing goes forward exactly, to the bit, and backward through its stand-in.

A comparison returns booleans, which carry no gradient. So a tensor of booleans or integers is given a *soft
value*: a float tensor near it, with a graph. Operators that turn it into floats again, or that select by it, hand
the gradient to its soft value.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Arguments = tuple[Any, ...]
Rule = Callable[["Relaxing", Callable[..., Any], Arguments, dict[str, Any]], Any]
"""``(mode, function, arguments, keywords)`` to what the function returns."""

SATURATED = 0.1
"""A squashing's input is brought back to a spread of this divided by the temperature."""

_SOFT, _SOURCE, _CHOICE = "_kwta_exp_soft", "_kwta_exp_source", "_kwta_exp_choice"
"""Attributes of tensors: the soft value; what was detached; which values an index stands for."""


class Relaxing(TorchFunctionMode):
    """While it is active, operators pass gradients that they do not pass by themselves.

    Args:
        temperature: width of the stand-ins, as a multiple of the standard deviation of the values that compete.
        exact_forward: compute the operators themselves forward; else their stand-ins, where these are floats.

    Attributes:
        relaxed: how many calls of each kind were relaxed.
        lost: how many calls gave values away to where no gradient can follow, such as NumPy.
    """

    def __init__(self, temperature: float, exact_forward: bool = True) -> None:
        super().__init__()
        self.temperature = temperature
        self.exact_forward = exact_forward
        self.relaxed: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.paused = 0

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
            setattr(passed, _SOFT, soft)
            return passed
        setattr(exact, _SOFT, soft)
        return exact

    def gate(self, difference: Tensor, like: Tensor, dims: Sequence[int]) -> Tensor:
        """``sigmoid(difference / (temperature * spread))``: the spread is that of ``like`` over ``dims``."""
        return torch.sigmoid(difference / (self.temperature * spread(like, dims)))


class StraightThrough(torch.autograd.Function):
    """Forward the first argument, backward to the second."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, soft: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


@dataclass(frozen=True)
class _Choice:
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
        threshold = self.ranked.narrow(self.dim, -1, 1).detach()
        return mode.gate(self.sign * (self.source - threshold), self.source, [self.dim])


def spread(x: Tensor, dims: Sequence[int]) -> Tensor:
    """The standard deviation over ``dims``, kept as dimensions, without a graph; 1 where it is 0."""
    x = x.detach()
    if math.prod(x.shape[dim] for dim in dims) < 2:
        dims = range(1, x.dim()) if x.dim() > 1 else range(x.dim())
    deviation = x.std(tuple(dims), unbiased=False, keepdim=True)
    return torch.where(deviation > 0, deviation, 1.0)


def _soft(value: Any) -> Tensor | None:
    """The soft value of a tensor, if it has one."""
    return getattr(value, _SOFT, None) if isinstance(value, Tensor) else None


def _graph(value: Any) -> Tensor | None:
    """What a gradient by ``value`` can go to: its soft value, itself, or what it was detached from."""
    if not isinstance(value, Tensor):
        return None
    soft = _soft(value)
    if soft is not None:
        return soft
    if value.requires_grad and value.is_floating_point():
        return value
    return getattr(value, _SOURCE, None)


def _exact(func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """The operator itself, without a graph."""
    with torch.no_grad():
        return func(*args, **kwargs)


def _broadcast_dims(wide: Tensor, other: Any) -> list[int]:
    """The dimensions along which ``other`` is one value for all of ``wide``: the values there compete."""
    if not isinstance(other, Tensor) or other.dim() != wide.dim():
        return []
    sizes = zip(wide.shape, other.shape, other.stride(), strict=True)
    return [dim for dim, (size, own, stride) in enumerate(sizes) if size > 1 and (own == 1 or stride == 0)]


def _of_each_image(x: Tensor) -> list[int]:
    return list(range(1, x.dim())) if x.dim() > 1 else list(range(x.dim()))


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 1


# Comparisons.


def _comparison(kind: str) -> Rule:
    sign = {"gt": 1, "ge": 1, "lt": -1, "le": -1}.get(kind, 0)

    def rule(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
        exact = func(*args, **kwargs)
        if len(args) < 2 or not isinstance(exact, Tensor):
            return exact
        first, second = _graph(args[0]), _graph(args[1])
        if first is None and second is None:
            return exact
        a, b = (args[0] if first is None else first), (args[1] if second is None else second)
        # An operand that is one value for many others is a threshold, and counts as a constant.
        wide, other = (a, b) if _size(a) >= _size(b) and not _broadcast_dims(b, a) else (b, a)
        if not isinstance(wide, Tensor) or not wide.requires_grad:
            return exact
        dims = _broadcast_dims(wide, other)
        if dims and isinstance(other, Tensor):
            a, b = (wide, other.detach()) if wide is a else (other.detach(), wide)
        dims = dims or _of_each_image(wide)
        with torch.enable_grad():
            difference = a - b
            if sign:
                soft = mode.gate(sign * difference, wide, dims)
            else:
                soft = torch.exp(-difference.abs() / (mode.temperature * spread(wide, dims)))
                soft = 1 - soft if kind == "ne" else soft
        mode.relaxed["comparison"] += 1
        return mode.passed(exact, soft)

    return rule


def _logical(combine: Callable[..., Tensor]) -> Rule:
    def rule(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
        softs = [_soft(value) for value in args]
        exact = func(*args, **kwargs)
        if not isinstance(exact, Tensor) or all(soft is None for soft in softs):
            return exact
        like = next(soft for soft in softs if soft is not None)
        with torch.enable_grad():
            values = [
                soft if soft is not None else torch.as_tensor(value).to(like)
                for soft, value in zip(softs, args, strict=True)
            ]
            return mode.passed(exact, combine(*values))

    return rule


# Arithmetic, casts and shapes.


def _arithmetic(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Products and sums with tensors that have a soft value."""
    softs = [_soft(value) for value in args]
    if all(soft is None for soft in softs):
        return func(*args, **kwargs)
    with torch.enable_grad():
        soft = func(*(value if soft is None else soft for soft, value in zip(softs, args, strict=True)), **kwargs)
        return mode.passed(_exact(func, args, kwargs), soft)


def _in_place(name: str) -> Rule:
    """The rule of an in-place operator: that of the operator itself, copied into the tensor."""

    def rule(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
        target, before = args[0], args[0].clone()  # the graph must not see what is overwritten
        for attribute in (_SOFT, _SOURCE):
            if (held := getattr(target, attribute, None)) is not None:
                setattr(before, attribute, held)
        made = _RULES[name](mode, getattr(torch.Tensor, name), (before, *args[1:]), kwargs)
        return _overwritten(target, made)

    def checked(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
        relevant = [*args, *kwargs.values()]
        seen = any(_graph(value) is not None or hasattr(value, _CHOICE) for value in relevant)
        return (rule if seen else _plain)(mode, func, args, kwargs)

    return checked


def _overwritten(target: Tensor, made: Tensor) -> Tensor:
    """``target`` with the values, the gradient and the soft value of ``made``."""
    if target.is_floating_point() and torch.is_grad_enabled():
        target.copy_(made)
    else:
        with torch.no_grad():
            target.copy_(made)
    setattr(target, _SOFT, _soft(made))
    return target


def _plain(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _cast(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """A cast between booleans, integers and floats."""
    source, exact = args[0], func(*args, **kwargs)
    if not isinstance(exact, Tensor) or exact is source:
        return exact
    soft = _soft(source)
    if soft is not None:
        with torch.enable_grad():
            return mode.passed(exact.detach(), soft)
    graph = _graph(source)
    if graph is None or exact.is_floating_point():
        return exact
    if exact.dtype == torch.bool:  # as a comparison with 0
        return _RULES["ne"](mode, torch.ne, (source, 0), {})
    mode.relaxed["cast"] += 1
    return mode.passed(exact, graph)


def _shape(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """An operator that moves values, applied to the soft value, to what was detached and to an index too."""
    if not isinstance(args[0], Tensor):
        return func(*args, **kwargs)
    exact = func(*args, **kwargs)
    for attribute in (_SOFT, _SOURCE):
        held = getattr(args[0], attribute, None)
        if held is not None:
            with torch.enable_grad():
                _attach(exact, func(held, *args[1:], **kwargs), attribute)
    if not torch.is_grad_enabled() and args[0].requires_grad:  # a mask is often made without a graph
        with torch.enable_grad():
            _attach(exact, func(*args, **kwargs), _SOURCE)
    return exact


def _attach(to: Any, held: Any, attribute: str) -> None:
    if isinstance(to, Tensor):
        setattr(to, attribute, held)
    elif isinstance(to, tuple | list):
        for each, part in zip(to, held, strict=True):
            _attach(each, part, attribute)


def _joined(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``cat`` and ``stack`` of tensors of which some have a soft value."""
    exact = func(*args, **kwargs)
    tensors = args[0] if args else kwargs.get("tensors", ())
    softs = [_soft(each) for each in tensors]
    if all(soft is None for soft in softs):
        return exact
    like = next(soft for soft in softs if soft is not None)
    with torch.enable_grad():
        values = [each.to(like) if soft is None else soft for soft, each in zip(softs, tensors, strict=True)]
        return mode.passed(exact.detach(), func(values, *args[1:], **kwargs))


def _detach(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """A later comparison of what was detached sees what it was detached from; arithmetic does not."""
    exact = func(*args, **kwargs)
    if getattr(func, "__name__", "") == "__get__" and getattr(func, "__self__", None) is not torch.Tensor.data:
        return exact
    graph = _graph(args[0])
    if graph is not None and exact.is_floating_point():
        setattr(exact, _SOURCE, graph)
    elif (soft := _soft(args[0])) is not None:
        setattr(exact, _SOFT, soft)
    return exact


def _given_away(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    if _graph(args[0]) is not None:
        mode.lost[getattr(func, "__name__", str(func)).strip("_")] += 1
    return func(*args, **kwargs)


# Selection by a mask.


def _where(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``where(mask, x, y)``, or ``x.where(mask, y)``."""
    if len(args) != 3:
        return func(*args, **kwargs)
    method = isinstance(args[0], Tensor) and args[0].dtype != torch.bool
    mask, x, y = (args[1], args[0], args[2]) if method else args
    return _selected(mode, mask, x, y, func, args)


def _masked_fill(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    if len(args) != 3:
        return func(*args, **kwargs)
    x, mask, value = args
    return _selected(mode, mask, value, x, func, args)


def _selected(
    mode: Relaxing, mask: Tensor, x: Any, y: Any, func: Callable[..., Any], args: Arguments
) -> Any:
    soft = _soft(mask)
    if soft is None:
        return func(*args)
    exact = _exact(func, args, {})
    if not exact.is_floating_point():
        return exact
    with torch.enable_grad():
        return mode.passed(exact, soft * _finite(x) + (1 - soft) * _finite(y))


def _finite(value: Any) -> Any:
    """``value`` for use in a product; infinite constants count as 0 there."""
    if isinstance(value, Tensor):
        return value if value.requires_grad else value.nan_to_num(0.0, 0.0, 0.0)
    return value if math.isfinite(value) else 0.0


def _getitem(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """A slice; values at a mask; the first entries of an index in order of rank."""
    x, index = args
    soft = _soft(index)
    if soft is not None and x.is_floating_point():
        exact = func(x, index)
        with torch.enable_grad():
            taken = soft[index]
            return exact * mode.passed(torch.ones_like(taken), taken).view(-1, *[1] * (exact.dim() - 1))
    choice: _Choice | None = getattr(x, _CHOICE, None)
    if choice is not None:
        exact = func(x, index)
        last = index[-1] if isinstance(index, tuple) else index
        along_last = (isinstance(index, tuple) and len(index) == x.dim()) or x.dim() == 1
        if along_last and choice.dim == x.dim() - 1 and isinstance(last, slice) and last.start in (None, 0):
            ranked = func(choice.ranked, index)
            if ranked.shape[-1]:
                setattr(exact, _CHOICE, _Choice(choice.source, choice.dim, choice.sign, ranked))
        return exact
    return _shape(mode, func, args, kwargs)


def _setitem(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``x[mask] = value``."""
    x, index, value = args
    soft = _soft(index)
    single = not isinstance(value, Tensor) or value.numel() == 1
    if soft is None or not single or not x.is_floating_point():
        return func(*args, **kwargs)
    exact = x.detach().clone()
    with torch.no_grad():
        exact[index] = value
    with torch.enable_grad():
        soft = soft.view(*soft.shape, *[1] * (x.dim() - soft.dim()))
        made = mode.passed(exact, soft * _finite(value) + (1 - soft) * x.clone())
    _overwritten(x, made)
    return None


# Selection of the largest values.


def _ranking(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``topk``, ``sort``, ``argsort``, ``max``, ``argmax`` and their opposites: what the index stands for."""
    found = func(*args, **kwargs)
    name = func.__name__
    source = _graph(args[0]) if args else None
    if source is None or source.shape != args[0].shape:
        return found
    given = list(args[1:])
    if name == "topk" and given:
        given.pop(0)  # k
    dim = kwargs.get("dim", given[0] if given else (None if name in ("max", "min", "argmax", "argmin") else -1))
    if not isinstance(dim, int) or isinstance(dim, bool):
        return found
    dim %= max(1, source.dim())
    index = found if isinstance(found, Tensor) else found[1]
    if name in ("topk",):
        largest = bool(kwargs.get("largest", given[1] if len(given) > 1 else True))
    elif name in ("sort", "argsort"):
        largest = bool(kwargs.get("descending", given[1] if len(given) > 1 else False))
    else:
        largest = name in ("max", "argmax")
    keepdim = index.dim() == source.dim()
    at = index if keepdim else index.unsqueeze(dim)
    with torch.enable_grad():
        ranked = source.gather(dim, at)
        choice = _Choice(source, dim, 1 if largest else -1, ranked, keepdim)
        setattr(index, _CHOICE, choice)
        if not isinstance(found, Tensor) and name == "topk":
            setattr(found[0], _CHOICE, choice)
    return found


def _gather(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Values at an index are known to be those of its source, if they are."""
    found = func(*args, **kwargs)
    choice: _Choice | None = getattr(args[2], _CHOICE, None) if len(args) > 2 else None
    if choice is not None and _graph(args[0]) is choice.source:
        setattr(found, _CHOICE, choice)
    return found


def _scatter(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Values written at an index that stands for the largest ones."""
    if len(args) + len(kwargs) < 4 or "reduce" in kwargs:
        return func(*args, **kwargs)
    base, dim, index, *rest = args
    value = rest[0] if rest else kwargs.get("src", kwargs.get("value"))
    choice: _Choice | None = getattr(index, _CHOICE, None)
    if choice is None or base.shape != choice.source.shape or dim % base.dim() != choice.dim:
        return func(*args, **kwargs)
    exact = _exact(func, args, kwargs)
    with torch.enable_grad():
        member = choice.membership(mode)
        if getattr(value, _CHOICE, None) is choice or (isinstance(value, Tensor) and value.requires_grad):
            written: Any = choice.source
        else:
            written = value.to(member).mean(choice.dim, keepdim=True) if isinstance(value, Tensor) else float(value)
        known = base if base.requires_grad else base.to(member)
        mode.relaxed["selection"] += 1
        return mode.passed(exact, member * written + (1 - member) * known)


def _one_hot(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """The code of the largest value."""
    exact = func(*args, **kwargs)
    choice: _Choice | None = getattr(args[0], _CHOICE, None)
    if choice is None or choice.keepdim or exact.shape[-1] != choice.source.shape[choice.dim]:
        return exact
    with torch.enable_grad():
        mode.relaxed["selection"] += 1
        return mode.passed(exact, choice.membership(mode).movedim(choice.dim, -1))


# Rounding, steps and squashing.


def _straight(kind: str) -> Rule:
    """Forward the operator, backward the identity."""

    def rule(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
        graph = _graph(args[0])
        if graph is None:
            return func(*args, **kwargs)
        mode.relaxed[kind] += 1
        return mode.passed(_exact(func, args, kwargs), graph)

    return rule


def _clamp(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """With both bounds, the flat parts pass the gradient; with one it is a ReLU, which is left alone."""
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    if low is None or high is None:
        return func(*args, **kwargs)
    return _straight("clamp")(mode, func, args, kwargs)


def _sign(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``sign`` as a tanh, ``heaviside`` as a sigmoid."""
    graph = _graph(args[0])
    if graph is None:
        return func(*args, **kwargs)
    with torch.enable_grad():
        gate = mode.gate(graph, graph, _of_each_image(graph))
        soft = gate if func.__name__ == "heaviside" else 2 * gate - 1
    mode.relaxed["sign"] += 1
    return mode.passed(_exact(func, args, kwargs), soft)


def _floor_division(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    graph = _graph(args[0])
    if graph is None:
        return func(*args, **kwargs)
    mode.relaxed["rounding"] += 1
    with torch.enable_grad():
        return mode.passed(_exact(func, args, kwargs), graph / args[1])


def _bucketize(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """The number of a bucket, as a straight line through the boundaries."""
    sorted_first = func.__name__ == "searchsorted"
    x, boundaries = (args[1], args[0]) if sorted_first else (args[0], args[1])
    graph = _graph(x)
    exact = func(*args, **kwargs)
    if graph is None or not isinstance(boundaries, Tensor) or boundaries.numel() < 1:
        return exact
    width = (boundaries.amax() - boundaries.amin()).clamp_min(1e-12) / max(1, boundaries.shape[-1] - 1)
    mode.relaxed["rounding"] += 1
    with torch.enable_grad():
        return mode.passed(exact, graph / width)


def _squashing(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``softmax``, ``sigmoid`` and ``tanh``: an input that saturates them is scaled down in the backward pass."""
    x = args[0]
    if not isinstance(x, Tensor) or not x.requires_grad:
        return func(*args, **kwargs)
    softmax = "softmax" in func.__name__
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if softmax and not isinstance(dim, int):
        return func(*args, **kwargs)
    with torch.enable_grad():
        if softmax:
            size = spread(x, _of_each_image(x))
        else:
            dims = tuple(range(1, x.dim())) or (0,)
            size = x.detach().square().mean(dims, keepdim=True).sqrt()
        limit = SATURATED / mode.temperature
        factor = (limit / size).clamp_max(1.0).nan_to_num(1.0)
        if bool((factor < 1).any()):
            mode.relaxed[func.__name__.strip("_")] += 1
            return mode.passed(_exact(func, args, kwargs), func(x * factor, *args[1:], **kwargs))
    return func(*args, **kwargs)


def _either(a: Tensor, b: Tensor) -> Tensor:
    return a + b - a * b


def _differ(a: Tensor, b: Tensor) -> Tensor:
    return a + b - 2 * a * b


_RULES: dict[str, Rule] = {
    **{name: _comparison(name) for name in ("gt", "ge", "lt", "le", "eq", "ne")},
    **dict.fromkeys(("greater",), _comparison("gt")),
    **dict.fromkeys(("greater_equal",), _comparison("ge")),
    **dict.fromkeys(("less",), _comparison("lt")),
    **dict.fromkeys(("less_equal",), _comparison("le")),
    **dict.fromkeys(("__and__", "__rand__", "logical_and", "bitwise_and"), _logical(torch.mul)),
    **dict.fromkeys(("__or__", "__ror__", "logical_or", "bitwise_or"), _logical(_either)),
    **dict.fromkeys(("__xor__", "__rxor__", "logical_xor", "bitwise_xor"), _logical(_differ)),
    **dict.fromkeys(("__invert__", "logical_not", "bitwise_not"), _logical(lambda a: 1 - a)),
    **dict.fromkeys(
        ("mul", "multiply", "__mul__", "__rmul__", "add", "__add__", "__radd__", "sub", "subtract", "__sub__", "rsub",
         "__rsub__", "div", "divide", "true_divide", "neg", "negative", "sum", "mean", "cumsum"),
        _arithmetic,
    ),
    **dict.fromkeys(
        ("to", "float", "double", "half", "bfloat16", "int", "long", "short", "byte", "char", "bool", "type",
         "type_as"),
        _cast,
    ),
    **dict.fromkeys(
        ("view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "moveaxis",
         "unsqueeze", "squeeze", "expand", "expand_as", "contiguous", "clone", "repeat", "view_as", "reshape_as",
         "narrow", "select", "flip", "roll", "chunk", "split", "unbind", "broadcast_to", "t", "abs",
         "repeat_interleave", "tile", "unfold"),
        _shape,
    ),
    **dict.fromkeys(("cat", "stack", "concat", "concatenate"), _joined),
    **dict.fromkeys(("detach", "__get__"), _detach),
    **dict.fromkeys(("numpy", "__array__", "item", "tolist", "__float__", "__int__"), _given_away),
    "where": _where,
    "masked_fill": _masked_fill,
    "__getitem__": _getitem,
    "__setitem__": _setitem,
    **dict.fromkeys(("topk", "sort", "argsort", "max", "min", "argmax", "argmin"), _ranking),
    "gather": _gather,
    "scatter": _scatter,
    "one_hot": _one_hot,
    **dict.fromkeys(("round", "floor", "ceil", "trunc", "fix"), _straight("rounding")),
    **dict.fromkeys(("floor_divide", "__floordiv__"), _floor_division),
    **dict.fromkeys(("bucketize", "searchsorted"), _bucketize),
    **dict.fromkeys(("clamp", "clip"), _clamp),
    **dict.fromkeys(("sign", "sgn", "heaviside"), _sign),
    **dict.fromkeys(("softmax", "log_softmax", "sigmoid", "tanh"), _squashing),
}  # fmt: skip
_RULES |= {
    f"{name}_": _in_place(name)
    for name in (
        "gt", "ge", "lt", "le", "logical_and", "logical_or", "logical_not", "mul", "add", "sub", "div",
        "masked_fill", "scatter", "round", "floor", "ceil", "trunc", "clamp", "sign", "sigmoid", "tanh",
    )
}  # fmt: skip
_RULES |= {
    f"__i{name}__": _in_place(f"__{name}__" if name in ("and", "or", "xor") else name)
    for name in ("and", "or", "xor", "mul", "add", "sub")
}

_by_function: dict[Any, Rule | None] = {}


def _rule_of(func: Callable[..., Any]) -> Rule | None:
    """The rule of a function, found by its name once."""
    try:
        return _by_function[func]
    except KeyError:
        rule = _RULES.get(getattr(func, "__name__", ""))
        _by_function[func] = rule
        return rule
