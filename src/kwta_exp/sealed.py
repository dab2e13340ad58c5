"""Binary files that carry a checksum of their own content: arrays, weights and training states.

Weights are read here without torch, so that a plan can check them before torch is loaded.
"""

import hashlib
import io
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors

from kwta_exp.errors import DamagedError
from kwta_exp.received import refuse_zip_bomb
from kwta_exp.storage import CHECKSUM, damaged, read_bytes, write_bytes

WEIGHTS_CHECKSUM = "kwta_exp_sha256"
"""The metadata key of a safetensors file's checksum. Files that others made have none."""

_MISMATCH = "its checksum does not match its content"
_TRAILER = b"sha256:"
_TRAILER_BYTES = len(_TRAILER) + 64 + 1


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Replace a compressed ``.npz`` file atomically, with a checksum."""
    buffer = io.BytesIO()
    checksum = np.array(_sha256_of_arrays(arrays).encode())
    np.savez_compressed(buffer, **arrays, **{CHECKSUM: checksum})  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read a file of :func:`write_arrays`; raises as :func:`~kwta_exp.storage.read_json`."""
    content = read_bytes(path)
    try:
        refuse_zip_bomb(path)
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = dict(file)
        if arrays.pop(CHECKSUM).item() != _sha256_of_arrays(arrays).encode():
            raise ValueError(_MISMATCH)
    except Exception as error:  # on damaged bytes np.load raises errors of many kinds
        raise damaged(path, error) from error
    return arrays


def _sha256_of_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def seal(content: bytes) -> bytes:
    """``content`` followed by its SHA-256."""
    return content + _TRAILER + hashlib.sha256(content).hexdigest().encode() + b"\n"


def unseal(path: Path) -> bytes:
    """The content of a file that :func:`seal` made; raises as :func:`~kwta_exp.storage.read_json`."""
    sealed = read_bytes(path)
    content = sealed[:-_TRAILER_BYTES]
    if seal(content) != sealed:
        raise damaged(path, _MISMATCH)
    return content


def with_metadata(serialized: bytes, metadata: Mapping[str, str]) -> bytes:
    """Add text and a checksum to the header of a serialized safetensors file.

    The entries are sorted: the library writes metadata in any order, so that equal content would give files of
    different digests.
    """
    (length,) = struct.unpack("<Q", serialized[:8])
    header, values = json.loads(serialized[8 : 8 + length]), serialized[8 + length :]
    entries: dict[str, str] = dict(sorted(metadata.items()))
    entries[WEIGHTS_CHECKSUM] = _sha256_of_weights({"__metadata__": entries, **header}, [values])
    text = json.dumps({"__metadata__": entries, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + values


def _sha256_of_weights(header: Mapping[str, Any], blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, after a check of the whole file; ``{}`` for other files.

    Raises:
        DamagedError: if the file is not a complete safetensors file, or its checksum does not match. A file
            that others made needs no checksum; the checkpoints in a run folder must have one.
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
                raise ValueError("its metadata is not text")
            claimed = metadata.pop(WEIGHTS_CHECKSUM, None)
            if claimed is None and not _is_run_checkpoint(path):
                return metadata
            found = _sha256_of_weights(header, iter(lambda: file.read(1 << 20), b""))
    except (OSError, ValueError, AttributeError, RecursionError, MemoryError) as error:
        raise _incomplete(path, error) from error
    if claimed != found:
        raise DamagedError(f"weights={path}: damaged; {_MISMATCH}")
    return metadata


def _incomplete(path: Path, error: Exception) -> DamagedError:
    return DamagedError(f"weights={path}: not a complete safetensors file ({error})")


def _is_run_checkpoint(path: Path) -> bool:
    run = path.parent.parent
    return (
        path.parent.name == "checkpoints"
        and path.stem in ("best", "last")
        and any((run / name).exists() for name in ("config.yaml", "environment.json"))
    )


def trained_ratio(path: Path) -> float | None:
    """The sparsity ratio in a safetensors file; ``None`` unless it holds exactly one, in (0, 1].

    A layer rejects an invalid ratio when its weights are loaded.

    Raises:
        DamagedError: as :func:`read_metadata`.
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
        raise _incomplete(path, error) from error
    return ratios.pop() if len(ratios) == 1 and 0 < min(ratios) <= 1 else None


def is_extra_state(name: str) -> bool:
    """Whether a state dict's key holds what ``nn.Module.get_extra_state`` returned."""
    return name.rpartition(".")[2] == "_extra_state"
