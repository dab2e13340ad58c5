"""Text and JSON files that are written atomically and carry a checksum of their own content; digests.

The checksum lies inside the file, so no second file can fall out of step with it.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from kwta_exp.errors import DamagedError, UserError
from kwta_exp.received import regular_size

PARTIAL = ".partial"
"""The suffix of temporary files. A writer that is killed leaves one behind."""

CHECKSUM = "checksum"
"""The key under which JSON and ``.npz`` files keep the SHA-256 of the rest of their content."""

MAX_TEXT_BYTES = 2**28
"""The largest JSON or YAML file that is read. A sparse file can claim any size."""

_guarded: dict[Path, tuple[int, int]] = {}
"""Folders inside :func:`guarded`, with the device and inode of each."""


@contextlib.contextmanager
def guarded(root: Path) -> Iterator[None]:
    """Make the folder ``root``, and guard every write below it until the end of the ``with`` block.

    A write through a symbolic link is refused. So is any write after ``root`` was deleted or replaced, which
    would leave half a folder.

    Raises:
        UserError: if the folder cannot be made.
    """
    root = _absolute(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _guarded[root] = _identity(root)
    except OSError as error:
        raise UserError(f"cannot write {root}: {error.strerror}") from error
    try:
        yield
    finally:
        del _guarded[root]


def check_guard(path: Path) -> None:
    """Raise a :class:`UserError` if writing ``path`` would leave a folder that is :func:`guarded`."""
    path = _absolute(path)
    for root, identity in _guarded.items():
        if root not in path.parents:
            continue
        if not root.exists() or _identity(root) != identity:
            raise UserError(f"{root}: deleted or replaced during the run; run the same command again")
        for part in (path, *path.parents):
            if part == root:
                break
            if part.is_symlink():
                raise UserError(f"{part}: is a symbolic link, which is not followed for writing; remove it")


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of ``path`` atomically, and make its folder if there is none.

    The bytes go to a temporary file in the same folder, are flushed to disk, and the file is renamed. Whenever
    the writer is killed, a reader finds either the old file or the new one.

    Raises:
        UserError: if the file cannot be written (the old file is unchanged, no temporary file is left), or the
            folder is :func:`guarded` and the write would leave it.
    """
    try:
        check_guard(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, content)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. The old file is unchanged; once there is space and"
            " permission, the same command continues"
        ) from error


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, content: str) -> None:
    """Replace a UTF-8 text file atomically."""
    write_bytes(path, content.encode())


def read_text_bytes(path: Path) -> bytes:
    """:func:`read_bytes` of a text file, which may have at most :data:`MAX_TEXT_BYTES`."""
    return read_bytes(path, MAX_TEXT_BYTES)


def read_bytes(path: Path, max_bytes: float = math.inf) -> bytes:
    """The content of a regular file. A pipe, a device or a folder is not opened.

    Raises:
        UserError: if there is no such file.
        DamagedError: if it is not a regular file, is larger than ``max_bytes``, or cannot be read.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file")
    try:
        if (size := regular_size(path)) > max_bytes:
            raise ValueError(f"{size:,} bytes; expected at most {max_bytes:,}")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, why: object) -> DamagedError:
    """The error for a damaged file, with the reason and the remedy."""
    return DamagedError(f"{path}: damaged ({why}). Run the command that made it again")


def set_aside(path: Path, suffix: str) -> Path:
    """Rename ``path`` to ``<name><suffix>-<time>`` and return the new path.

    Raises:
        UserError: if it cannot be renamed.
    """
    check_guard(path)
    stem = f"{path.name}{suffix}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    free = next(other for name in names if not os.path.lexists(other := path.with_name(name)))
    try:
        return path.rename(free)
    except OSError as error:
        raise UserError(f"cannot rename {path}: {error.strerror}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically, with a checksum. NaN and infinities are refused: JSON has none."""
    plain = json.loads(json.dumps(content, allow_nan=False))
    write_text(path, json.dumps({**plain, CHECKSUM: sha256_of_json(plain)}, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of :func:`write_json` and remove the checksum.

    Raises:
        UserError: if there is no such file.
        DamagedError: if it has changed since it was written.
    """
    return _parsed(path, [read_text_bytes(path)])[0]


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSON Lines file atomically: one object per line, each with its checksum."""
    write_text(path, "".join(json.dumps({**each, CHECKSUM: sha256_of_json(each)}) + "\n" for each in records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of :func:`write_lines` and remove the checksums; raises as :func:`read_json`."""
    return _parsed(path, read_text_bytes(path).splitlines())


def _parsed(path: Path, texts: Iterable[bytes]) -> list[dict[str, Any]]:
    try:
        return [_parse_checked(text) for text in texts]
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def _parse_checked(text: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant}; expected a finite number")

    content = json.loads(text, parse_constant=refuse)
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}; expected an object")
    if content.pop(CHECKSUM, None) != sha256_of_json(content):
        raise ValueError("its checksum does not match its content")
    return content


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a regular file's bytes.

    Raises:
        UserError: if the file is missing or cannot be read.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    raise UserError(f"{path}: no such file")


def sha256_of_json(content: Any) -> str:
    """Hex SHA-256 of a JSON-like value, the same for any order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def image_digests(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.bytes_]:
    """The first 16 hex digits of each image's SHA-256, from uint8 ``(N, C, H, W)``."""
    return np.array(
        [hashlib.sha256(image.tobytes()).hexdigest()[:16].encode() for image in images], dtype="S16"
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, on platforms where folders can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
