"""The code that a plain configuration names: which it is, its digest, and whether a stranger may name it."""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kwta_exp.errors import UserError
from kwta_exp.storage import sha256_of_file

TRUSTED = frozenset({
    "torch.nn.ReLU",
    *(f"kwta_exp.activations.{name}" for name in ("KWTA", "LWTA")),
    *(f"kwta_exp.models.{name}" for name in (
        "CNN", "Converted", "DenseNet", "MLP", "ResNet", "Torchvision", "VGG", "WideResNet",
    )),
    *(f"kwta_exp.data.datasets.{name}" for name in (
        "Arrays", "CIFAR10", "CIFAR100", "Digits", "FashionMNIST", "MNIST", "SVHN", "Synthetic",
    )),
    "kwta_exp.data.image_folder.ImageFolder",
    "kwta_exp.attacks.Threat",
})  # fmt: skip
"""What a run folder may have built: it can come from anybody, and a ``_target_`` can be any function."""


def require_trusted(content: Any, group: str, source: str, allowed: Sequence[str]) -> None:
    """Refuse what a run folder names and this project does not have.

    Args:
        content: the group, plain, its interpolations unresolved.
        group: its name, for the message.
        source: the key and the folder, ``weights=FOLDER``, for the message.
        allowed: the interpolations it may hold: a resolver could make anything of a text.

    Raises:
        UserError: naming it.
    """
    for text in _texts(content):
        if "${" in text and text not in allowed:
            raise UserError(f"{source}: its {group} holds {text!r}, which is not resolved on a folder's word")
    for target in targets(content):
        if target not in TRUSTED:
            raise UserError(
                f"{source}: its {group} is a {target}, which is not this project's and is not built on a"
                f" folder's word; expected {group}=... on the command line, or trust=true for a folder of your"
                " own"
            )
    partial = True if group in ("activation", "model") else None
    for reserved, value in _reserved(content):
        if reserved != "_partial_" or value is not partial:
            raise UserError(
                f"{source}: its {group} holds {reserved}={_short(value)}, which no {group} of this project has;"
                f" expected {group}=... on the command line, or trust=true for a folder of your own"
            )


def _short(value: object) -> str:
    return str(value)[:100]


def _reserved(content: Any) -> Iterator[tuple[str, Any]]:
    """Hydra's own keys in a plain configuration, ``_target_`` apart: they decide how a class is called."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key in _RESERVED and key != "_target_":
                yield key, value
            yield from _reserved(value)
    elif isinstance(content, list):
        for value in content:
            yield from _reserved(value)


_RESERVED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "_target_": (lambda value: isinstance(value, str), "the dotted path of a class or function"),
    "_partial_": (lambda value: isinstance(value, bool), "true or false"),
    "_recursive_": (lambda value: isinstance(value, bool), "true or false"),
    "_convert_": (lambda value: value in ("none", "partial", "object", "all"), "none, partial, object or all"),
    "_args_": (lambda value: isinstance(value, list), "a list"),
}
"""What Hydra's own keys may hold."""


def require_buildable(content: Any, key: str) -> None:
    """Refuse what no part of a run can be, before anything is imported or called.

    Python's own functions are among it: nothing that a run is made of comes from there, and
    ``os.remove`` does its work while it is "built".

    Args:
        content: a group, plain.
        key: where it stands, for the message.

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
            f"{key}._target_={target}: Python's own library has no part of a run; expected a class of this"
            " project, of torch, torchvision or foolbox, or of yours"
        )


def _texts(content: Any) -> Iterator[str]:
    """Every text in a plain configuration, keys too."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield str(key)
            yield from _texts(value)
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value)
    elif isinstance(content, str):
        yield content


def targets(content: Any) -> Iterator[str]:
    """Every ``_target_`` in a plain configuration."""
    if isinstance(content, Mapping):
        if "_target_" in content:
            yield str(content["_target_"])
        for value in content.values():
            yield from targets(value)
    elif isinstance(content, list):
        for value in content:
            yield from targets(value)


def local_code(content: Any) -> dict[str, str]:
    """SHA-256 of the source files that the targets in ``content`` come from, outside installed packages.

    A user's own class decides results as much as any value does, and it has no version.
    """
    digests = {}
    for target in (*targets(content), *_gates(content)):
        module = target
        while "." in module:
            module = module.rpartition(".")[0]
            if module.split(".")[0] in ("kwta_exp", "torch", "torchvision", "foolbox"):
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


def _gates(content: Any) -> Iterator[str]:
    """Every class and function named in a ``gates`` mapping (of the bpda attack)."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key == "gates" and isinstance(value, Mapping):
                yield from map(str, (*value.keys(), *value.values()))
            yield from _gates(value)
    elif isinstance(content, list):
        for value in content:
            yield from _gates(value)
