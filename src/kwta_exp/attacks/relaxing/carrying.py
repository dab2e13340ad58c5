"""How a soft value, and with it the gradient, travels: logic, arithmetic, casts, shapes and masks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kwta_exp.attacks.relaxing.mode import (
    CHOICE,
    RULES,
    SOFT,
    SOURCE,
    Arguments,
    Choice,
    Relaxing,
    Rule,
    exactly,
    graph_of,
    rule,
    soft_value,
)  # fmt: skip


def _logical(combine: Callable[..., Tensor]) -> Rule:
    def rule(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
        softs = [soft_value(value) for value in args]
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


@rule(
    "mul",
    "multiply",
    "__mul__",
    "__rmul__",
    "add",
    "__add__",
    "__radd__",
    "sub",
    "subtract",
    "__sub__",
    "rsub",
    "__rsub__",
    "div",
    "divide",
    "true_divide",
    "neg",
    "negative",
    "sum",
    "mean",
    "cumsum",
)
def _arithmetic(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Products and sums with tensors that have a soft value."""
    softs = [soft_value(value) for value in args]
    if all(soft is None for soft in softs):
        return func(*args, **kwargs)
    with torch.enable_grad():
        soft = func(
            *(value if soft is None else soft for soft, value in zip(softs, args, strict=True)), **kwargs
        )
        return mode.passed(exactly(func, args, kwargs), soft)


def _in_place(name: str) -> Rule:
    """The rule of an in-place operator: that of the operator itself, copied into the tensor."""

    def rule(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
        target, before = args[0], args[0].clone()  # the graph must not see what is overwritten
        for attribute in (SOFT, SOURCE):
            if (held := getattr(target, attribute, None)) is not None:
                setattr(before, attribute, held)
        made = RULES[name](mode, getattr(torch.Tensor, name), (before, *args[1:]), kwargs)
        return _overwritten(target, made)

    def checked(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
        relevant = [*args, *kwargs.values()]
        seen = any(graph_of(value) is not None or hasattr(value, CHOICE) for value in relevant)
        return (rule if seen else _plain)(mode, func, args, kwargs)

    return checked


def _overwritten(target: Tensor, made: Tensor) -> Tensor:
    """``target`` with the values, the gradient and the soft value of ``made``."""
    if target.is_floating_point() and torch.is_grad_enabled():
        target.copy_(made)
    else:
        with torch.no_grad():
            target.copy_(made)
    setattr(target, SOFT, soft_value(made))
    return target


def _plain(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


@rule(
    "to",
    "float",
    "double",
    "half",
    "bfloat16",
    "int",
    "long",
    "short",
    "byte",
    "char",
    "bool",
    "type",
    "type_as",
)
def _cast(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """A cast between booleans, integers and floats."""
    source, exact = args[0], func(*args, **kwargs)
    if not isinstance(exact, Tensor) or exact is source:
        return exact
    soft = soft_value(source)
    if soft is not None:
        with torch.enable_grad():
            return mode.passed(exact.detach(), soft)
    graph = graph_of(source)
    if graph is None or exact.is_floating_point():
        return exact
    if exact.dtype == torch.bool:  # as a comparison with 0
        return RULES["ne"](mode, torch.ne, (source, 0), {})
    mode.relaxed["cast"] += 1
    return mode.passed(exact, graph)


@rule(
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "swapaxes",
    "movedim",
    "moveaxis",
    "unsqueeze",
    "squeeze",
    "expand",
    "expand_as",
    "contiguous",
    "clone",
    "repeat",
    "view_as",
    "reshape_as",
    "narrow",
    "select",
    "flip",
    "roll",
    "chunk",
    "split",
    "unbind",
    "broadcast_to",
    "t",
    "abs",
    "repeat_interleave",
    "tile",
    "unfold",
)
def _shape(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """An operator that moves values, applied to the soft value, to what was detached and to an index too."""
    if not isinstance(args[0], Tensor):
        return func(*args, **kwargs)
    exact = func(*args, **kwargs)
    for attribute in (SOFT, SOURCE):
        held = getattr(args[0], attribute, None)
        if held is not None:
            with torch.enable_grad():
                _attach(exact, func(held, *args[1:], **kwargs), attribute)
    if not torch.is_grad_enabled() and args[0].requires_grad:  # a mask is often made without a graph
        with torch.enable_grad():
            _attach(exact, func(*args, **kwargs), SOURCE)
    return exact


def _attach(to: Any, held: Any, attribute: str) -> None:
    if isinstance(to, Tensor):
        setattr(to, attribute, held)
    elif isinstance(to, tuple | list):
        for each, part in zip(to, held, strict=True):
            _attach(each, part, attribute)


@rule("cat", "stack", "concat", "concatenate")
def _joined(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``cat`` and ``stack`` of tensors of which some have a soft value."""
    exact = func(*args, **kwargs)
    tensors = args[0] if args else kwargs.get("tensors", ())
    softs = [soft_value(each) for each in tensors]
    if all(soft is None for soft in softs):
        return exact
    like = next(soft for soft in softs if soft is not None)
    with torch.enable_grad():
        values = [each.to(like) if soft is None else soft for soft, each in zip(softs, tensors, strict=True)]
        return mode.passed(exact.detach(), func(values, *args[1:], **kwargs))


@rule("detach", "__get__")
def _detach(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """A later comparison of what was detached sees what it was detached from; arithmetic does not."""
    exact = func(*args, **kwargs)
    if getattr(func, "__name__", "") == "__get__" and getattr(func, "__self__", None) is not torch.Tensor.data:
        return exact
    graph = graph_of(args[0])
    if graph is not None and exact.is_floating_point():
        setattr(exact, SOURCE, graph)
    elif (soft := soft_value(args[0])) is not None:
        setattr(exact, SOFT, soft)
    return exact


@rule("numpy", "__array__", "item", "tolist", "__float__", "__int__")
def _given_away(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    if graph_of(args[0]) is not None:
        mode.lost[getattr(func, "__name__", str(func)).strip("_")] += 1
    return func(*args, **kwargs)


@rule("where")
def _where(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``where(mask, x, y)``, or ``x.where(mask, y)``."""
    if len(args) != 3:
        return func(*args, **kwargs)
    method = isinstance(args[0], Tensor) and args[0].dtype != torch.bool
    mask, x, y = (args[1], args[0], args[2]) if method else args
    return _selected(mode, mask, x, y, func, args)


@rule("masked_fill")
def _masked_fill(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    if len(args) != 3:
        return func(*args, **kwargs)
    x, mask, value = args
    return _selected(mode, mask, value, x, func, args)


def _selected(mode: Relaxing, mask: Tensor, x: Any, y: Any, func: Callable[..., Any], args: Arguments) -> Any:
    soft = soft_value(mask)
    if soft is None:
        return func(*args)
    exact = exactly(func, args, {})
    if not exact.is_floating_point():
        return exact
    with torch.enable_grad():
        return mode.passed(exact, soft * _finite(x) + (1 - soft) * _finite(y))


def _finite(value: Any) -> Any:
    """``value`` for use in a product; infinite constants count as 0 there."""
    if isinstance(value, Tensor):
        return value if value.requires_grad else value.nan_to_num(0.0, 0.0, 0.0)
    return value if math.isfinite(value) else 0.0


@rule("__getitem__")
def _getitem(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """A slice; values at a mask; the first entries of an index in order of rank."""
    x, index = args
    soft = soft_value(index)
    if soft is not None and x.is_floating_point():
        exact = func(x, index)
        with torch.enable_grad():
            taken = soft[index]
            return exact * mode.passed(torch.ones_like(taken), taken).view(-1, *[1] * (exact.dim() - 1))
    choice: Choice | None = getattr(x, CHOICE, None)
    if choice is not None:
        exact = func(x, index)
        last = index[-1] if isinstance(index, tuple) else index
        along_last = (isinstance(index, tuple) and len(index) == x.dim()) or x.dim() == 1
        if along_last and choice.dim == x.dim() - 1 and isinstance(last, slice) and last.start in (None, 0):
            ranked = func(choice.ranked, index)
            if ranked.shape[-1]:
                setattr(exact, CHOICE, Choice(choice.source, choice.dim, choice.sign, ranked))
        return exact
    return _shape(mode, func, args, kwargs)


@rule("__setitem__")
def _setitem(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``x[mask] = value``."""
    x, index, value = args
    soft = soft_value(index)
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


def _either(a: Tensor, b: Tensor) -> Tensor:
    return a + b - a * b


def _differ(a: Tensor, b: Tensor) -> Tensor:
    return a + b - 2 * a * b


RULES |= {
    **dict.fromkeys(("__and__", "__rand__", "logical_and", "bitwise_and"), _logical(torch.mul)),
    **dict.fromkeys(("__or__", "__ror__", "logical_or", "bitwise_or"), _logical(_either)),
    **dict.fromkeys(("__xor__", "__rxor__", "logical_xor", "bitwise_xor"), _logical(_differ)),
    **dict.fromkeys(("__invert__", "logical_not", "bitwise_not"), _logical(lambda a: 1 - a)),
}
RULES |= {
    f"{name}_": _in_place(name)
    for name in (
        "gt", "ge", "lt", "le", "logical_and", "logical_or", "logical_not", "mul", "add", "sub", "div",
        "masked_fill", "scatter", "round", "floor", "ceil", "trunc", "clamp", "sign", "sigmoid", "tanh",
    )
}  # fmt: skip
RULES |= {
    f"__i{name}__": _in_place(f"__{name}__" if name in ("and", "or", "xor") else name)
    for name in ("and", "or", "xor", "mul", "add", "sub")
}
