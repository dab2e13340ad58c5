"""Files that are whole or absent and say so themselves, and digests of what they hold.

Every file that is read back carries a checksum of its own content, so that no second file can fall behind it.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import safetensors

from kwta_exp.errors import DamagedError, UserError
from kwta_exp.received import regular_size

PARTIAL = ".partial"
"""How the temporary files end that a killed writer leaves behind."""

CHECKSUM = "checksum"
"""Where JSON and ``.npz`` files have the SHA-256 of everything else in them."""

WEIGHTS_CHECKSUM = "kwta_exp_sha256"
"""Where the metadata of a safetensors file has it. Files from elsewhere have none."""

MOST_TEXT = 2**28
"""Bytes of a JSON or YAML file; a file with holes can claim any size."""

_held: dict[Path, tuple[int, int]] = {}


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Make the folder ``root``; meanwhile, whatever is written below it stays there.

    A symbolic link below ``root`` is refused, and so is writing once ``root`` was deleted or replaced, which
    would leave half a folder.

    Raises:
        UserError: if it cannot be made.
    """
    root = _absolute(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _held[root] = _identity(root)
    except OSError as error:
        raise UserError(f"cannot write {root}: {error.strerror}") from error
    try:
        yield
    finally:
        del _held[root]


def refuse_to_leave(path: Path) -> None:
    """Raise a :class:`UserError` if ``path`` is in a held folder by its name alone; see :func:`held`."""
    path = _absolute(path)
    for root, identity in _held.items():
        if root not in path.parents:
            continue
        if not root.exists() or _identity(root) != identity:
            raise UserError(
                f"{root}: was deleted or replaced while it was written; the same command makes it again"
            )
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
    """Replace ``path`` by ``content`` atomically, making its folder if need be.

    The bytes go to a temporary name in the same folder, are flushed to the disk and renamed, so a
    reader or a killed writer sees the old file or the new one and never a part.

    Raises:
        UserError: if the disk is full or refuses; the old file stands and no temporary one is left. Also where
            :func:`held` forbids it.
    """
    try:
        refuse_to_leave(path)
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


def read_text_bytes(path: Path) -> bytes:
    """:func:`read_bytes` of a file of :data:`MOST_TEXT` bytes at most: text has no need of more."""
    return read_bytes(path, MOST_TEXT)


def read_bytes(path: Path, most: float = math.inf) -> bytes:
    """The content of a regular file; nothing else (a pipe, a device, a folder) is opened.

    Raises:
        UserError: if there is none.
        DamagedError: if something else has its name, or the disk refuses.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file")
    try:
        if (size := regular_size(path)) > most:
            raise ValueError(f"{size:,} bytes; expected {most:,} at most")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, why: object) -> DamagedError:
    """The error that says so, and what to do."""
    return DamagedError(f"{path}: damaged ({why}). The command that made it makes it again")


def aside(path: Path, suffix: str) -> Path:
    """Rename ``path`` to ``<name>.<suffix>-<time>``, and say to what.

    Raises:
        UserError: if that cannot be done.
    """
    refuse_to_leave(path)
    stem = f"{path.name}{suffix}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    free = next(other for name in names if not os.path.lexists(other := path.with_name(name)))
    try:
        return path.rename(free)
    except OSError as error:
        raise UserError(f"cannot rename {path}: {error.strerror}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically, with a checksum; NaN and infinities are refused, since JSON has none."""
    plain = json.loads(json.dumps(content, allow_nan=False))
    write_text(path, json.dumps({**plain, CHECKSUM: sha256_of_json(plain)}, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote, without the checksum.

    Raises:
        UserError: if there is no such file.
        DamagedError: if it is not as it was written.
    """
    content = read_text_bytes(path)
    try:
        return _checked(content)
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file of JSON objects atomically: one a line, each with its checksum."""
    write_text(path, "".join(json.dumps({**each, CHECKSUM: sha256_of_json(each)}) + "\n" for each in records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What :func:`write_lines` wrote; raises as :func:`read_json`."""
    content = read_text_bytes(path)
    try:
        return [_checked(line) for line in content.splitlines()]
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def _checked(text: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    content = json.loads(text, parse_constant=refuse)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    if content.pop(CHECKSUM, None) != sha256_of_json(content):
        raise ValueError("its checksum is not that of its content")
    return content


def with_metadata(safetensors: bytes, metadata: Mapping[str, str]) -> bytes:
    """A serialised safetensors file with text in its header, checksum included, in an order of its own.

    The library writes metadata in any order, so that equal files would have different digests.
    """
    header, values = _split(safetensors)
    about: dict[str, str] = dict(sorted(metadata.items()))
    about[WEIGHTS_CHECKSUM] = _sha256_of_weights({"__metadata__": about, **header}, [values])
    text = json.dumps({"__metadata__": about, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + values


def _split(safetensors: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", safetensors[:8])
    return json.loads(safetensors[8 : 8 + length]), safetensors[8 + length :]


def _sha256_of_weights(header: Mapping[str, Any], values: Iterable[bytes]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    for some in values:
        digest.update(some)
    return digest.hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """The text beside the weights in a safetensors file; nothing for other files.

    Raises:
        DamagedError: if it is not as it was written. A file from elsewhere has no checksum and is not held to
            one; the checkpoints in a run folder must have it.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        if not path.is_file():
            raise ValueError("no such file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header ends beyond the file")
            header = json.loads(file.read(length))
            metadata: dict[str, str] = header.get("__metadata__", {})
            if not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("its metadata is no text")
            claimed = metadata.pop(WEIGHTS_CHECKSUM, None)
            if claimed is None and not _is_of_a_run(path):
                return metadata
            found = _sha256_of_weights(header, iter(lambda: file.read(1 << 20), b""))
    except (OSError, ValueError, AttributeError, RecursionError, MemoryError) as error:
        raise DamagedError(f"weights={path}: not a whole safetensors file ({error})") from error
    if claimed != found:
        raise DamagedError(f"weights={path}: damaged; its checksum is not that of its content")
    return metadata


def _is_of_a_run(path: Path) -> bool:
    run = path.parent.parent
    return (
        path.parent.name == "checkpoints"
        and path.stem in ("best", "last")
        and any((run / name).exists() for name in ("config.yaml", "environment.json"))
    )


def trained_ratio(path: Path) -> float | None:
    """The sparsity ratio in a safetensors file, read without torch; ``None`` unless it holds one valid ratio.

    Raises:
        DamagedError: if it is not a whole safetensors file.
    """
    if path.suffix != ".safetensors":
        return None
    read_metadata(path)  # checks its checksum
    try:
        with safetensors.safe_open(path, "numpy") as file:
            states = {name: file.get_slice(name) for name in file.keys() if is_extra_state(name)}  # noqa: SIM118
            kinds = {name: [state.get_dtype(), *state.get_shape()] for name, state in states.items()}
            ratios = {float(file.get_tensor(name)) for name in states if kinds[name] == ["F64"]}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise DamagedError(f"weights={path}: not a whole safetensors file ({error})") from error
    return ratios.pop() if len(ratios) == 1 and 0 < min(ratios) <= 1 else None


def is_extra_state(name: str) -> bool:
    """Whether a state dict's key holds what ``nn.Module.get_extra_state`` returned."""
    return name.rpartition(".")[2] == "_extra_state"


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a regular file's bytes.

    Raises:
        UserError: if it cannot be read.
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
