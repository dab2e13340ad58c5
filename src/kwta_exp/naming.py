"""Names of files: which names are allowed, and how any text is turned into one."""

import re
from collections.abc import Iterable

from kwta_exp.errors import UserError

LONGEST = 100
"""Most characters of a name; its files add a number, an extension and a temporary suffix."""

RESERVED = frozenset({"clean", "evaluation", "images", "repeated", "results"})
"""The names of an evaluation's own files and folders, beside ``binarized-...``."""

_LONG_NUMBER = 10
"""Characters beyond which a number is shortened: a sweeper that draws numbers draws all their digits."""

_SAFE = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]*")


def safe_name(name: object, key: str = "attack") -> str:
    """``name`` itself, if ``<name>.npz`` is a file inside an evaluation's folder on any file system.

    Args:
        name: the name of an attack, from a configuration or from a run folder; it is untrusted.
        key: what the message calls it.

    Raises:
        UserError: if it is not a string, is longer than :data:`LONGEST`, has other characters than ASCII
            letters, digits and ``_ . + -``, begins with ``.`` or ``-``, or is one of :data:`RESERVED`, in upper
            or lower case.
    """
    shown = f"{key}: name {_short(repr(name))}"
    if not isinstance(name, str):
        raise UserError(f"{shown} is a {type(name).__name__}; expected a string, since a file gets this name")
    if len(name) > LONGEST or not _SAFE.fullmatch(name):
        raise UserError(
            f"{shown} cannot name a file; expected letters, digits, _ . + - (not . or - first),"
            f" {LONGEST} at most"
        )
    if name.lower() in RESERVED or name.lower().startswith("binarized-"):
        raise UserError(
            f"{shown} is reserved for a file of the evaluation; expected another name than"
            f" {', '.join(sorted(RESERVED))}, binarized-..."
        )
    return name


def safe_names(names: Iterable[object], key: str = "attack") -> list[str]:
    """The names themselves, if each is safe and no two differ only in upper and lower case.

    Raises:
        UserError: naming the first that is not allowed.
    """
    seen: dict[str, str] = {}
    for name in (safe_name(each, key) for each in names):
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise UserError(f"{key}: names {other} and {name} differ only in case; expected another name")
    return list(seen.values())


def in_few_digits(amount: object) -> str:
    """A number for a folder's name: six digits, if it has many more. The hash in the name tells runs apart."""
    text = str(amount)
    return f"{amount:.6g}" if isinstance(amount, float) and len(text) > _LONG_NUMBER else text


def as_name(text: str) -> str:
    """``text`` as a file name: other characters become ``_``, and only the end of a long text is kept."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", text)[-LONGEST:].lstrip(".-")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}... ({len(text)} characters)"
