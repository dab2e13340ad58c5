"""Checks made before a file from an untrusted source is read: its kind, and its size once expanded."""

import contextlib
import pickletools
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import yaml

MAX_EXPANDED_BYTES = 2**32
"""An archive may always expand to this many bytes."""

MAX_EXPANSION = 100
"""A larger archive may expand to this multiple of its own size: images compress up to ten times."""

MAX_YAML_CHARACTERS = 2**20
MAX_YAML_VALUES = 10_000
MAX_YAML_DEPTH = 30

MAX_PICKLE_OBJECTS = 10**7
"""Objects in the pickle of a torch file, counted once for each reference: hashing this many takes a second."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular_size(path: Path) -> int:
    """The size in bytes of a regular file, or of the file that a link points to. Nothing is opened.

    Other kinds of files cannot be read to the end: a pipe waits for a writer, a device may never end.

    Raises:
        ValueError: if there is no regular file; the message says what is there instead.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise ValueError("a broken link" if path.is_symlink() else "no such file") from error
    except OSError as error:
        raise ValueError(error.strerror) from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{_KINDS.get(stat.S_IFMT(found.st_mode), 'a special file')}, not a file")
    return found.st_size


def refuse_zip_bomb(path: Path) -> None:
    """Refuse anything but a regular file, and a zip archive that would fill the memory.

    ``.npz`` and torch files are zip archives. One is refused if its members together exceed both
    :data:`MAX_EXPANDED_BYTES` and :data:`MAX_EXPANSION` times the file's size, or if a member's compression
    method has no bounded ratio. Readers never read more of a member than its header declares.

    Raises:
        ValueError: with the reason.
        OSError: if the file cannot be read.
    """
    size = regular_size(path)
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                _check_members(archive.infolist(), size)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(str(error)) from error


def _check_members(members: Sequence[zipfile.ZipInfo], size: int) -> None:
    if {member.compress_type for member in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise ValueError("compressed by another method than deflate")
    expanded = sum(member.file_size for member in members)
    if expanded > max(MAX_EXPANDED_BYTES, MAX_EXPANSION * size):
        raise ValueError(
            f"{size:,} bytes that expand to {expanded:,}; expected at most {MAX_EXPANDED_BYTES:,} or"
            f" {MAX_EXPANSION} times the file"
        )


def plain_yaml(text: str) -> Any:
    """Parse YAML that holds plain values only, within limits of length, depth and number of values.

    Aliases are refused: through them a few bytes can expand without bound, or refer to themselves.

    Raises:
        ValueError: with the reason.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"longer than {MAX_YAML_CHARACTERS:,} characters")
    depth = 0
    try:
        for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            if number > MAX_YAML_VALUES:
                raise ValueError(f"more than {MAX_YAML_VALUES:,} keys and values")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("holds an alias; expected plain values")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_YAML_DEPTH:
                raise ValueError(f"nested more than {MAX_YAML_DEPTH} deep")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not plain YAML ({str(error).splitlines()[0]})") from error


def refuse_pickle_bomb(path: Path) -> None:
    """Refuse a torch file whose pickle refers to the same few objects so often that hashing them never ends.

    A dictionary hashes its keys. A tuple that holds one tuple twice, which holds another twice, and so on,
    takes twice the time for every three bytes. No object is built here, and a file that is not a pickle is
    accepted: its reader reports it.

    Raises:
        ValueError: if the pickle exceeds :data:`MAX_PICKLE_OBJECTS`.
        OSError: if the file cannot be read.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.lower().endswith(".pkl"):
                    with archive.open(name) as pickled:
                        _check_pickle(pickled)
    else:
        with path.open("rb") as pickles:
            for _ in range(5):  # a legacy file: magic number, version, system, content, storage keys
                _check_pickle(pickles)


def _check_pickle(pickled: IO[bytes]) -> None:
    """Follow the pickle's stack, with the expanded size of each object in its place and ``None`` for a mark."""
    stack: list[int | None] = []
    memo: dict[object, int | None] = {}
    size = 0
    with contextlib.suppress(ValueError, IndexError, KeyError):  # not a pickle
        for operation, argument, _ in pickletools.genops(pickled):
            if operation.name == "MARK":
                stack.append(None)
            elif operation.name.endswith("PUT") or operation.name == "MEMOIZE":
                memo[len(memo) if operation.name == "MEMOIZE" else argument] = stack[-1]
            elif operation.name.endswith("GET"):
                stack.append(memo[argument])
            else:
                size = 1 + _pop_operands(stack, operation)
                if size > MAX_PICKLE_OBJECTS:
                    break
                stack += [size] * len(operation.stack_after)
    if size > MAX_PICKLE_OBJECTS:
        raise ValueError(f"a pickle bomb: more than {MAX_PICKLE_OBJECTS:,} objects in a few bytes")


def _pop_operands(stack: list[int | None], operation: pickletools.OpcodeInfo) -> int:
    """Pop the operands of ``operation`` and return their total size."""
    size = 0
    operands = list(operation.stack_before)
    if pickletools.markobject in operands:
        while (item := stack.pop()) is not None:
            size += item
        operands = operands[: operands.index(pickletools.markobject)]
    return size + sum(stack.pop() or 0 for _ in operands)
