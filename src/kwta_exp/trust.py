"""The code that a configuration names: which of it a run folder may name, what can be built, and its digest."""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kwta_exp.errors import UserError
from kwta_exp.storage import sha256_of_file

TRUSTED = frozenset({
    "torch.nn.ReLU",
    *(f"kwta_exp.activations.{name}" for name in ("KWTA", "LWTA", "MeanSparse", "StochasticLWTA")),
    *(f"kwta_exp.models.{name}" for name in (
        "CNN", "Converted", "DenseNet", "MLP", "ResNet", "Torchvision", "VGG", "WideResNet",
    )),
    *(f"kwta_exp.data.datasets.{name}" for name in (
        "Arrays", "CIFAR10", "CIFAR100", "Digits", "FashionMNIST", "MNIST", "SVHN", "Synthetic",
    )),
    "kwta_exp.data.image_folder.ImageFolder",
    "kwta_exp.attacks.Threat",
})  # fmt: skip
"""The classes that a run folder may name: folders are untrusted, and a ``_target_`` can be any function."""

TRUST_IT = "trust=true if you trust the folder"
"""The way out of every message about a folder that is not trusted."""

_RESERVED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "_target_": (lambda value: isinstance(value, str), "the dotted path of a class or function"),
    "_partial_": (lambda value: isinstance(value, bool), "true or false"),
    "_recursive_": (lambda value: isinstance(value, bool), "true or false"),
    "_convert_": (lambda value: value in ("none", "partial", "object", "all"), "none, partial, object or all"),
    "_args_": (lambda value: isinstance(value, list), "a list"),
}
"""What Hydra's own keys may hold."""

INSTALLED = ("kwta_exp", "torch", "torchvision", "foolbox")
"""Packages whose code is identified by commit or version."""


def require_trusted(content: Any, group: str, source: str, allowed: Sequence[str]) -> None:
    """Refuse code in a run folder that is not this project's.

    Args:
        content: the group, plain, its interpolations unresolved.
        group: its name, for the message.
        source: the key and the folder, ``weights=FOLDER``, for the message.
        allowed: the interpolations it may hold; a resolver can turn any text into any value.

    Raises:
        UserError: naming the interpolation, the class or the key of Hydra's that is not allowed.
    """
    instead = f"expected {group}=... on the command line, or {TRUST_IT}"
    for text in _texts(content):
        if "${" in text and text not in allowed:
            raise UserError(
                f"{source}: its {group} holds {text!r}; interpolations of a run folder are not resolved"
            )
    for target in targets(content):
        if target not in TRUSTED:
            raise UserError(
                f"{source}: its {group} is a {target}, which is not a class of this project; {instead}"
            )
    partial = True if group in ("activation", "model") else None
    for key, value in _items(content):
        if key in _RESERVED and key != "_target_" and (key != "_partial_" or value is not partial):
            raise UserError(
                f"{source}: its {group} holds {key}={str(value)[:100]}, which no {group} of this project has;"
                f" {instead}"
            )


def require_buildable(content: Any, key: str) -> None:
    """Refuse what cannot be part of a run, before anything is imported or called.

    That includes all of Python's standard library: no part of a run comes from there, and ``os.remove`` would
    delete a file while it is "built".

    Args:
        content: a group, plain.
        key: where it is in the configuration, for the message.

    Raises:
        UserError: naming key and value.
    """
    if isinstance(content, list):
        for number, value in enumerate(content):
            require_buildable(value, f"{key}.{number}")
    if not isinstance(content, Mapping):
        return
    for name, value in content.items():
        if name in _RESERVED:
            fits, expected = _RESERVED[name]
            if not fits(value):
                raise UserError(f"{key}.{name}={value!r}: expected {expected}")
        else:
            require_buildable(value, f"{key}.{name}")
    target = str(content.get("_target_", ""))
    if target.partition(".")[0] in sys.stdlib_module_names:
        raise UserError(
            f"{key}._target_={target}: nothing in Python's standard library can be part of a run; expected a"
            " class of this project, of torch, torchvision or foolbox, or your own"
        )


def targets(content: Any) -> Iterator[str]:
    """Every ``_target_`` in a plain configuration."""
    return (str(value) for key, value in _items(content) if key == "_target_")


def local_code(content: Any) -> dict[str, str]:
    """SHA-256 of the source files that the targets in ``content`` come from, by module.

    A user's own class decides results as much as any value does, and has no version. Installed packages are
    left out.
    """
    digests = {}
    for target in (*targets(content), *_gates(content)):
        module = target
        while "." in module:
            module = module.rpartition(".")[0]
            if module.split(".")[0] in INSTALLED:
                break
            try:
                origin = getattr(importlib.util.find_spec(module), "origin", None)
            except (ImportError, ValueError):
                continue
            if (
                origin
                and Path(origin).is_file()
                and not {"site-packages", "dist-packages"} & {*Path(origin).parts}
            ):
                digests[module] = sha256_of_file(Path(origin))
                break
    return digests


def _items(content: Any) -> Iterator[tuple[str | None, Any]]:
    """Every key and value at any depth of a plain configuration; the values of a list have no key."""
    if isinstance(content, Mapping):
        pairs: list[tuple[str | None, Any]] = [(str(key), value) for key, value in content.items()]
    else:
        pairs = [(None, value) for value in content] if isinstance(content, list) else []
    for key, value in pairs:
        yield key, value
        yield from _items(value)


def _texts(content: Any) -> Iterator[str]:
    """Every text in a plain configuration, keys included."""
    return (text for pair in _items(content) for text in pair if isinstance(text, str))


def _gates(content: Any) -> Iterator[str]:
    """Every class and function named in a ``gates`` mapping (of the bpda attack)."""
    for key, value in _items(content):
        if key == "gates" and isinstance(value, Mapping):
            yield from map(str, (*value.keys(), *value.values()))
