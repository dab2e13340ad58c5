"""The smooth functions that stand in for operators without a gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kwta_exp.activations.soft_gate import standard_deviation
from kwta_exp.attacks.relaxing.mode import (
    CHOICE,
    RULES,
    Arguments,
    Choice,
    Relaxing,
    Rule,
    broadcast_dims,
    exactly,
    graph_of,
    of_each_image,
    rank_dims,
    rule,
    size_of,
)  # fmt: skip

SATURATED = 0.1
"""A squashing's input is brought back to a spread of this divided by the temperature."""


def _comparison(kind: str) -> Rule:
    sign = {"gt": 1, "ge": 1, "lt": -1, "le": -1}.get(kind, 0)

    def rule(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
        exact = func(*args, **kwargs)
        if len(args) < 2 or not isinstance(exact, Tensor):
            return exact
        first, second = graph_of(args[0]), graph_of(args[1])
        if first is None and second is None:
            return exact
        a, b = (args[0] if first is None else first), (args[1] if second is None else second)
        # An operand that is one value for many others is a threshold.
        is_wide = size_of(a) >= size_of(b) and not broadcast_dims(b, a)
        wide, other = (a, b) if second is None or (first is not None and is_wide) else (b, a)
        if not wide.requires_grad:
            return exact
        ranked = rank_dims(wide, other)
        dims = ranked or broadcast_dims(wide, other) or of_each_image(wide)
        side = sign if wide is a else -sign
        if ranked and not sign:  # equal to the largest: not below it
            side = int(bool((wide <= other).all())) - int(bool((wide >= other).all()))
        with torch.enable_grad():
            if ranked and side:
                soft = mode.membership(wide, other, side, dims)
            else:
                apart = (wide - other) / mode.width(wide, dims)
                soft = (side * apart).sigmoid() if side else (-apart.abs()).exp()
            soft = 1 - soft if kind == "ne" else soft
        mode.relaxed["comparison"] += 1
        return mode.passed(exact, soft)

    return rule


@rule("topk", "sort", "argsort", "max", "min", "argmax", "argmin")
def _ranking(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``topk``, ``sort``, ``argsort``, ``max``, ``argmax`` and their opposites: what the index stands for."""
    found = func(*args, **kwargs)
    name = func.__name__
    source = graph_of(args[0]) if args else None
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
        choice = Choice(source, dim, 1 if largest else -1, ranked, keepdim)
        setattr(index, CHOICE, choice)
        if not isinstance(found, Tensor) and name == "topk":
            setattr(found[0], CHOICE, choice)
    return found


@rule("gather")
def _gather(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Values at an index are known to be those of its source, if they are."""
    found = func(*args, **kwargs)
    choice: Choice | None = getattr(args[2], CHOICE, None) if len(args) > 2 else None
    if choice is not None and graph_of(args[0]) is choice.source:
        setattr(found, CHOICE, choice)
    return found


@rule("scatter")
def _scatter(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Values written at an index that stands for the largest ones."""
    if len(args) + len(kwargs) < 4 or "reduce" in kwargs:
        return func(*args, **kwargs)
    base, dim, index, *rest = args
    value: Any = rest[0] if rest else kwargs.get("src", kwargs.get("value"))
    choice: Choice | None = getattr(index, CHOICE, None)
    if choice is None or base.shape != choice.source.shape or dim % base.dim() != choice.dim:
        return func(*args, **kwargs)
    exact = exactly(func, args, kwargs)
    with torch.enable_grad():
        member = choice.membership(mode)
        if getattr(value, CHOICE, None) is choice or (isinstance(value, Tensor) and value.requires_grad):
            written: Any = choice.source
        else:
            written = (
                value.to(member).mean(choice.dim, keepdim=True) if isinstance(value, Tensor) else float(value)
            )
        if not base.requires_grad and not bool(base.any()):
            # Written into zeros: nothing but the membership is kept for the backward pass.
            soft = member if isinstance(written, float) and written == 1 else member * written
        else:
            known = base if base.requires_grad else base.to(member)
            soft = known + member * (written - known)
        mode.relaxed["selection"] += 1
        return mode.passed(exact, soft)


@rule("one_hot")
def _one_hot(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """The code of the largest value."""
    exact = func(*args, **kwargs)
    choice: Choice | None = getattr(args[0], CHOICE, None)
    if choice is None or choice.keepdim or exact.shape[-1] != choice.source.shape[choice.dim]:
        return exact
    with torch.enable_grad():
        mode.relaxed["selection"] += 1
        return mode.passed(exact, choice.membership(mode).movedim(choice.dim, -1))


def _straight(kind: str) -> Rule:
    """Forward the operator, backward the identity."""

    def rule(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
        graph = graph_of(args[0])
        if graph is None:
            return func(*args, **kwargs)
        mode.relaxed[kind] += 1
        return mode.passed(exactly(func, args, kwargs), graph)

    return rule


@rule("clamp", "clip")
def _clamp(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """With both bounds, the flat parts pass the gradient; with one it is a ReLU, which is left alone."""
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    if low is None or high is None:
        return func(*args, **kwargs)
    return _straight("clamp")(mode, func, args, kwargs)


@rule("sign", "sgn", "heaviside")
def _sign(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``sign`` as a tanh, ``heaviside`` as a sigmoid."""
    graph = graph_of(args[0])
    if graph is None:
        return func(*args, **kwargs)
    with torch.enable_grad():
        gate = mode.gate(graph, graph, of_each_image(graph))
        soft = gate if func.__name__ == "heaviside" else 2 * gate - 1
    mode.relaxed["sign"] += 1
    return mode.passed(exactly(func, args, kwargs), soft)


@rule("floor_divide", "__floordiv__")
def _floor_division(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    graph = graph_of(args[0])
    if graph is None:
        return func(*args, **kwargs)
    mode.relaxed["rounding"] += 1
    with torch.enable_grad():
        return mode.passed(exactly(func, args, kwargs), graph / args[1])


@rule("bucketize", "searchsorted")
def _bucketize(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """The number of a bucket, as a straight line through the boundaries."""
    sorted_first = func.__name__ == "searchsorted"
    x, boundaries = (args[1], args[0]) if sorted_first else (args[0], args[1])
    graph = graph_of(x)
    exact = func(*args, **kwargs)
    if graph is None or not isinstance(boundaries, Tensor) or boundaries.numel() < 1:
        return exact
    width = (boundaries.amax() - boundaries.amin()).clamp_min(1e-12) / max(1, boundaries.shape[-1] - 1)
    mode.relaxed["rounding"] += 1
    with torch.enable_grad():
        return mode.passed(exact, graph / width)


@rule("softmax", "log_softmax", "sigmoid", "tanh")
def _squashing(mode: Relaxing, func: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """``softmax``, ``sigmoid``, ``tanh``: an input that saturates them is scaled down in the backward pass."""
    x = args[0]
    if not isinstance(x, Tensor) or not x.requires_grad:
        return func(*args, **kwargs)
    softmax = "softmax" in func.__name__
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if softmax and not isinstance(dim, int):
        return func(*args, **kwargs)
    mode.squashings += 1
    with torch.enable_grad():
        if softmax:
            size = standard_deviation(x, of_each_image(x))
        else:
            dims = tuple(range(1, x.dim())) or (0,)
            size = x.detach().square().mean(dims, keepdim=True).sqrt()
        limit = SATURATED / mode.temperature
        factor = (limit / size).clamp_max(1.0).nan_to_num(1.0)
        if bool((factor < 1).any()):
            mode.relaxed[func.__name__.strip("_")] += 1
            return mode.passed(exactly(func, args, kwargs), func(x * factor, *args[1:], **kwargs))
    return func(*args, **kwargs)


RULES |= {name: _comparison(name) for name in ("gt", "ge", "lt", "le", "eq", "ne")}
RULES |= {"__eq__": RULES["eq"], "__ne__": RULES["ne"]}
RULES |= {"greater": RULES["gt"], "greater_equal": RULES["ge"], "less": RULES["lt"], "less_equal": RULES["le"]}
RULES |= dict.fromkeys(("round", "floor", "ceil", "trunc", "fix"), _straight("rounding"))
