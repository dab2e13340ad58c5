"""The code that a plain configuration names: which it is, its digest, and whether a stranger may name it."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
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
    "kwta_exp.data.folder.ImageFolder",
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
    """Every class and function named in a ``gates`` mapping (of the surrogate attack)."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key == "gates" and isinstance(value, Mapping):
                yield from map(str, (*value.keys(), *value.values()))
            yield from _gates(value)
    elif isinstance(content, list):
        for value in content:
            yield from _gates(value)
