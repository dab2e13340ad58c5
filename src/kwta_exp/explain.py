"""From a library's error to one message that names the key, its value and what was expected."""

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from kwta_exp.errors import UserError


def explanation(error: BaseException, key: str, values: Mapping[str, Any]) -> str:
    """One message for an ``error`` raised while building or using ``key`` with ``values``."""
    cause = _root_cause(error)
    if isinstance(cause, ValidationError):
        return explain_validation(cause, key, values)
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(cause, ImportError) or "Error locating target" in str(error):
        return (
            f"{key}._target_={values.get('_target_')}: cannot be imported ({cause});"
            " expected the dotted path of an importable class or function"
        )
    if culprit := _culprit(values, str(cause)):
        return f"{key}.{culprit}={values[culprit]!r}: {cause}"
    arguments = {k: v for k, v in values.items() if not k.startswith("_") and not isinstance(v, dict)}
    shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items()) or "no arguments"
    return f"{key}: {(str(cause) or type(cause).__name__).splitlines()[0]} (with {shown})"


def did_you_mean(name: str, names: Iterable[str], value: object = None, prefix: str = "") -> str:
    """``"; did you mean ...?"`` with the nearest of ``names``, or ``""`` if none is near."""
    near = get_close_matches(name, list(names), n=1, cutoff=0.6)
    if not near:
        return ""
    return f"; did you mean {prefix}{near[0]}{'' if value is None else f'={value}'}?"


def explain_validation(error: ValidationError, key: str, values: Mapping[str, Any]) -> str:
    """One line for each value that pydantic refused."""
    return "\n".join(_explain_field(detail, key, values) for detail in error.errors(include_url=False))


def _explain_field(detail: Any, key: str, values: Any) -> str:
    path, around = [key] if key else [], values
    for part in detail["loc"]:
        if (isinstance(values, Mapping) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        ):
            path.append(str(part))
            around, values = values, values[part]
        elif len(path) <= 1 and isinstance(part, str):
            path.append(part)  # a missing argument
            break
    where = ".".join(path)
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if detail["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}: missing; expected a value"
    if "unexpected" in detail["type"] or detail["type"] == "extra_forbidden":
        return _unknown_key(path, around)
    if isinstance(values, Mapping):
        return f"{where}: {message}"
    return f"{where}={values!r}: {message}"


def _unknown_key(path: list[str], values: Any) -> str:
    *parents, name = path
    taken = _parameters(values.get("_target_")) if isinstance(values, Mapping) else []
    near = did_you_mean(name, taken, prefix="".join(f"{parent}." for parent in parents))
    listed = f"; expected one of {', '.join(taken)}" if taken else ""
    return f"{'.'.join(path)}: unknown key{near}{listed}"


def _parameters(target: object) -> list[str]:
    """The names of a target's parameters, if it has a signature."""
    module, _, name = str(target).rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return []


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None and not isinstance(error, ValidationError | UserError):
        error = error.__cause__
    return error


def _culprit(values: Mapping[str, Any], message: str) -> str | None:
    """The only key whose value the message quotes, or the only text value if the message is about ``str``."""
    scalars = {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and isinstance(value, int | float | str) and not isinstance(value, bool)
    }
    quoted = [
        name
        for name, value in scalars.items()
        if re.search(rf"(?<![\w.]){re.escape(str(value))}(?![\w.])", message)
    ]
    if len(quoted) == 1:
        return quoted[0]
    texts = [name for name, value in scalars.items() if isinstance(value, str)]
    return texts[0] if len(texts) == 1 and "str" in message else None
