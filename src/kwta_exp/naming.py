"""Names that become file names: which are taken as they are, and how any text is made into one."""

import re
from collections.abc import Iterable

from kwta_exp.errors import UserError

LONGEST = 100
"""Characters of a name; its files add a number, an extension, and a suffix while they are written."""

RESERVED = frozenset({"clean", "evaluation", "images", "repeated", "results"})
"""What an evaluation's folder calls its own files and folders, beside ``binarized-...``."""

_SAFE = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]*")


def safe_name(name: object, key: str = "attack") -> str:
    """``name`` itself, if ``<name>.npz`` is a plain file of an evaluation's folder on any file system.

    Args:
        name: of an attack, from a configuration or from a run folder, which anybody may have written.
        key: what the message calls it.

    Raises:
        UserError: if it is no text, longer than :data:`LONGEST`, has other characters than ASCII letters,
            digits and ``_ . + -``, begins with ``.`` or ``-``, or is one of :data:`RESERVED`, in any case.
    """
    shown = f"{key}: name {_short(repr(name))}"
    if not isinstance(name, str):
        raise UserError(f"{shown} is a {type(name).__name__}; expected text, as a file is named by it")
    if len(name) > LONGEST or not _SAFE.fullmatch(name):
        raise UserError(
            f"{shown} cannot name a file; expected letters, digits, _ . + - (the first of them no . or -),"
            f" {LONGEST} at most"
        )
    if name.lower() in RESERVED or name.lower().startswith("binarized-"):
        raise UserError(
            f"{shown} is taken by a file of the evaluation itself; expected none of"
            f" {', '.join(sorted(RESERVED))}, binarized-..."
        )
    return name


def safe_names(names: Iterable[object], key: str = "attack") -> list[str]:
    """The names themselves, if each is safe and no two name one file where a and A are the same.

    Raises:
        UserError: naming the first that is not.
    """
    seen: dict[str, str] = {}
    for name in (safe_name(each, key) for each in names):
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise UserError(f"{key}: names {other} and {name} differ in case alone; expected another name")
    return list(seen.values())


def as_name(text: str) -> str:
    """``text`` made into a file name: other characters become ``_``, and of a long one the end is kept."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", text)[-LONGEST:].lstrip(".-")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}... ({len(text)} characters)"
