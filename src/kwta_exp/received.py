"""Files that anybody may have made, looked at before they are read: what they are, and how large inside."""

import contextlib
import pickletools
import stat
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import yaml

MOST_EXPANDED = 2**32
"""Bytes that an archive may always expand to."""

MOST_EXPANSION = 100
"""A larger archive may expand to this multiple of its own size: images compress up to ten times."""

MOST_YAML = 2**20
MOST_VALUES = 10_000
DEEPEST_YAML = 30

MOST_OBJECTS = 10**7
"""Objects that the pickle in a torch file may stand for: hashing so many takes a second."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular_size(path: Path) -> int:
    """Bytes of a regular file, or of the one that a link leads to; nothing is opened.

    Anything else cannot be read to its end: a pipe waits for a writer, a device may go on for ever.

    Raises:
        ValueError: saying what is there instead.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        there = "a link to what is not there" if path.is_symlink() else "no such file"
        raise ValueError(there) from error
    except OSError as error:
        raise ValueError(error.strerror) from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{_KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}, not a file")
    return found.st_size


def require_plain(path: Path) -> None:
    """Refuse what is no regular file, and an archive that would fill the memory.

    A zip archive, such as ``.npz`` and torch files are, is refused if its members together are larger than
    :data:`MOST_EXPANDED` and than :data:`MOST_EXPANSION` times the file, or are packed in a way that bounds
    nothing. Readers take no more of a member than the archive says that it holds.

    Raises:
        ValueError: saying why.
        OSError: if it cannot be read.
    """
    size = regular_size(path)
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                _refuse_bomb(archive.infolist(), size)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(str(error)) from error


def plain_yaml(text: str) -> Any:
    """The plain values in YAML of at most :data:`MOST_YAML` characters, nested within reason and not too many.

    An alias stands for anything of any size, itself included, so there may be none.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if len(text) > MOST_YAML:
        raise ValueError(f"longer than {MOST_YAML:,} characters")
    depth = 0
    try:
        for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            if number > MOST_VALUES:
                raise ValueError(f"more than {MOST_VALUES:,} keys and values")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("holds an alias; expected plain values")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST_YAML:
                raise ValueError(f"nested more than {DEEPEST_YAML} deep")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"no plain YAML ({str(error).splitlines()[0]})") from error


def require_untangled(path: Path) -> None:
    """Refuse a torch file whose pickles name few objects so often in each other that hashing them never ends.

    A dictionary hashes its keys, and a tuple of a tuple twice, of a tuple twice, and so on, costs twice as much
    with every three bytes. Nothing is built here; what is no pickle at all is left to its reader.

    Raises:
        ValueError: if so.
        OSError: if it cannot be read.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.lower().endswith(".pkl"):
                    with archive.open(name) as pickled:
                        _refuse_tangle(pickled)
    else:
        with path.open("rb") as pickles:
            for _ in range(5):  # a legacy file: a number, a version, a system, the content, the storages' keys
                _refuse_tangle(pickles)


def _refuse_tangle(pickled: IO[bytes]) -> None:
    """Follow the pickle's stack with the size of each object, written out, in its place."""
    stack: list[int | None] = []
    memo: dict[object, int | None] = {}
    with contextlib.suppress(IndexError, KeyError, UnicodeError, _ParseError):
        for operation, argument in _operations(pickled):
            if operation.name == "MARK":
                stack.append(None)
            elif operation.name.endswith("PUT") or operation.name == "MEMOIZE":
                memo[len(memo) if operation.name == "MEMOIZE" else argument] = stack[-1]
            elif operation.name.endswith("GET"):
                stack.append(memo[argument])
            else:
                size = 1 + _taken(stack, operation)
                if size > MOST_OBJECTS:
                    raise ValueError(f"more than {MOST_OBJECTS:,} objects in a few bytes")
                stack += [size] * len(operation.stack_after)


def _operations(pickled: IO[bytes]) -> Iterator[tuple[pickletools.OpcodeInfo, object]]:
    try:
        for operation, argument, _ in pickletools.genops(pickled):
            yield operation, argument
    except ValueError as error:
        raise _ParseError from error


class _ParseError(Exception):
    """What is read is no pickle."""


def _taken(stack: list[int | None], operation: pickletools.OpcodeInfo) -> int:
    """Take what ``operation`` works on from the stack, and say how large it is in all."""
    size = 0
    takes = list(operation.stack_before)
    if pickletools.markobject in takes:
        while (item := stack.pop()) is not None:
            size += item
        takes = takes[: takes.index(pickletools.markobject)]
    return size + sum(stack.pop() or 0 for _ in takes)


def _refuse_bomb(members: Sequence[zipfile.ZipInfo], size: int) -> None:
    if {member.compress_type for member in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise ValueError("packed by another method than deflate")
    expanded = sum(member.file_size for member in members)
    if expanded > max(MOST_EXPANDED, MOST_EXPANSION * size):
        raise ValueError(
            f"{size:,} bytes that expand to {expanded:,}; expected {MOST_EXPANDED:,} or"
            f" {MOST_EXPANSION} times the file at most"
        )
