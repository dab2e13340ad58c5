"""Factories that make the activations of a network."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

ActivationFactory = Callable[[], nn.Module]
"""Makes a new activation module, e.g. ``nn.ReLU`` or ``partial(KWTA, ratio=0.1)``."""

Activations = ActivationFactory | list[ActivationFactory]
"""One factory for the whole network, or a list with one for each stage."""


def per_stage(activation: Activations, stages: int) -> list[ActivationFactory]:
    """The factory of each stage.

    Raises:
        ValueError: if a list does not have one factory for each stage.
    """
    if not isinstance(activation, list):
        return [activation] * stages
    if len(activation) != stages:
        raise ValueError(
            f"activation lists {len(activation)} factories; expected one, or one for {stages} stages"
        )
    return activation


def with_facts(factory: Callable[..., Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The ``facts`` about the data that the signature of ``factory`` names; all, if it takes ``**kwargs``."""
    target = getattr(factory, "func", factory)
    names = inspect.signature(target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values()):
        return dict(facts)
    return {name: value for name, value in facts.items() if name in names}
