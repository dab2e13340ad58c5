"""Files that are either whole or absent, and digests of what they hold."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kwta_exp.errors import UserError

PARTIAL = ".partial"
"""How the temporary files end that a killed writer leaves behind."""


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` atomically, making its folder if need be.

    The bytes go to a temporary name in the same folder, are flushed to the disk and renamed, so a
    reader or a killed writer sees the old file or the new one and never a part.

    Raises:
        UserError: if the disk is full or refuses; the old file stands and no temporary one is left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, content)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. What was there is untouched; once there is room and"
            " permission, the same command continues"
        ) from error


def _replace(path: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; results are meant to be shared as the umask allows.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, content: str) -> None:
    """Replace a UTF-8 text file atomically."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically; NaN and infinities are refused, since JSON has none."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(content: Any) -> str:
    """Hex SHA-256 of a JSON-like value, the same for any order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """The text beside the weights in a safetensors file; nothing for other files."""
    import safetensors

    if path.suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"weights={path}: not a whole safetensors file ({error})") from error


def trained_ratio(path: Path) -> float | None:
    """The sparsity ratio that a schedule had brought these weights to, if one had.

    Raises:
        UserError: if what stands there is no ratio.
    """
    text = read_metadata(path).get("sparsity_ratio")
    if text is None:
        return None
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio <= 1:
        raise UserError(f"weights={path}: its sparsity_ratio is {text!r}; expected a number in (0, 1]")
    return ratio


def image_digests(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.bytes_]:
    """The first 16 hex digits of each image's SHA-256, from uint8 ``(N, C, H, W)``."""
    return np.array(
        [hashlib.sha256(image.tobytes()).hexdigest()[:16].encode() for image in images], dtype="S16"
    )


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the platform lets folders be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
