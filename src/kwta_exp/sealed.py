"""Arrays and bytes in files that carry a checksum of their own content."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kwta_exp.received import require_plain
from kwta_exp.storage import CHECKSUM, damaged, read_bytes, write_bytes

_TRAILER = b"sha256:"
_TRAILER_BYTES = len(_TRAILER) + 64 + 1


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Replace a compressed ``.npz`` file atomically, with a checksum."""
    buffer = io.BytesIO()
    checksum = np.array(_sha256_of_arrays(arrays).encode())
    np.savez_compressed(buffer, **arrays, **{CHECKSUM: checksum})  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """What :func:`write_arrays` wrote; raises as :func:`~kwta_exp.storage.read_json`."""
    content = read_bytes(path)
    try:
        require_plain(path)
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = dict(file)
        if arrays.pop(CHECKSUM).item() != _sha256_of_arrays(arrays).encode():
            raise ValueError("its checksum is not that of its content")
    except Exception as error:  # damaged bytes make the reader fail in any way whatever
        raise damaged(path, error) from error
    return arrays


def _sha256_of_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def seal(content: bytes) -> bytes:
    """``content`` with its SHA-256 behind it."""
    return content + _TRAILER + hashlib.sha256(content).hexdigest().encode() + b"\n"


def unseal(path: Path) -> bytes:
    """What :func:`seal` was given, from the file ``path``; raises as :func:`~kwta_exp.storage.read_json`."""
    whole = read_bytes(path)
    content = whole[:-_TRAILER_BYTES]
    if seal(content) != whole:
        raise damaged(path, "its checksum is not that of its content")
    return content
