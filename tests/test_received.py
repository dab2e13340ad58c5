"""Files from untrusted sources: special files, and files that would fill the memory, are refused unread."""

import bz2
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kwta_exp.checkpoint import read_weights
from kwta_exp.data.datasets import Arrays
from kwta_exp.errors import UserError
from kwta_exp.evaluation.records import CLEAN_COLUMNS, Record
from kwta_exp.plan import find_weights
from kwta_exp.received import (
    MAX_EXPANDED_BYTES,
    MAX_YAML_CHARACTERS,
    plain_yaml,
    refuse_zip_bomb,
    regular_size,
)
from kwta_exp.settings import Inputs, Paths


def inputs_for(path: Path) -> Inputs:
    paths = Paths(data=str(path.parent), outputs=str(path.parent))
    return Inputs(weights=str(path), weights_sha256=None, trust=False, paths=paths)


READERS: dict[str, Callable[[Path], object]] = {
    "dataset.path": lambda path: Arrays(path=str(path)).load(),
    "dataset.path, fingerprint": lambda path: Arrays(path=str(path)).fingerprint(),
    "weights": lambda path: find_weights(inputs_for(path)),
    "weights, read": read_weights,
    "a record": lambda path: Record.read(path, CLEAN_COLUMNS),
}

SPECIAL_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo": (lambda path: os.mkfifo(path), "a named pipe, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device, not a file"),
    "loop": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", SPECIAL_FILES)
@pytest.mark.parametrize("reader", READERS)
def test_a_special_file_is_refused_unopened(reader: str, kind: str, tmp_path: Path) -> None:
    make, message = SPECIAL_FILES[kind]
    path = tmp_path / "it.npz"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        READERS[reader](path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("reader", ["dataset.path, fingerprint", "weights", "weights, read"])
@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "a\0b", ""], ids=["missing", "long", "nul", "empty"])
def test_a_missing_or_impossible_path_is_one_message(reader: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^(dataset\.path|weights)="):
        READERS[reader](tmp_path / name)


def _bomb(path: Path, sizes: dict[str, int], method: int = zipfile.ZIP_DEFLATED) -> None:
    """A small archive whose members declare the given sizes."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in sizes:
            archive.writestr(name, b"\0" * 1000)
    content = path.read_bytes()
    for size in sizes.values():
        content = content.replace((1000).to_bytes(4, "little"), size.to_bytes(4, "little"), 2)
    path.write_bytes(content)


@pytest.mark.parametrize("reader", ["dataset.path", "weights, read", "a record"])
def test_a_zip_bomb_is_refused(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    _bomb(path, {"x_train.npy": 3_000_000_000, "x_test.npy": 3_000_000_000})
    with pytest.raises(UserError, match=r"bytes that expand to 6,000,000,000; expected"):
        READERS[reader](path)


def test_an_archive_may_expand_to_three_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "fine.npz"
    _bomb(path, {"x_train.npy": 3_000_000_000})
    refuse_zip_bomb(path)
    assert MAX_EXPANDED_BYTES > 3_000_000_000


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_of_unbounded_compression_is_refused(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("x_train.npy", b"\0" * 1000)
    with pytest.raises(UserError, match="another method than deflate"):
        Arrays(path=str(tmp_path / "a.npz")).load()


def _npy(shape: tuple[int, ...], dtype: str = "|u1", data: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + data


ARRAYS: dict[str, bytes] = {
    "terabytes": _npy((10**6, 10**6, 10)),
    "a size beyond int64": _npy((2**62, 2**62)),
    "negative": _npy((-1, 5)),
    "objects": _npy((1,), "|O", pickle.dumps(np.array([print], dtype=object))),
    "a truncated header": b"\x93NUMPY\x01\x00\xff\xff",
    "a long header": b"\x93NUMPY\x02\x00" + (2**20).to_bytes(4, "little") + b"(" * 2**20,
    "code in the header": b"\x93NUMPY\x01\x00"
    + (64).to_bytes(2, "little")
    + b"__import__('os').abort()".ljust(64),
    "an unknown version": b"\x93NUMPY\x09\x00" + b"\0" * 100,
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_a_malformed_array_is_one_message(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", ARRAYS[kind])
    with pytest.raises(UserError, match=r"^dataset\.path=.*: not a readable \.npz of plain arrays"):
        Arrays(path=str(path)).load()


@pytest.mark.parametrize(
    "content", [_npy((1,), data=b"\0"), bz2.compress(b"\0" * 10**6), b"", b"PK\x05\x06" + b"\xff" * 18]
)
def test_a_file_that_is_not_an_npz_is_one_message(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^dataset\.path=.*: not a readable \.npz of plain arrays"):
        Arrays(path=str(path)).load()


def test_npz_members_that_are_not_arrays_are_reported(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", b"none")
    with pytest.raises(UserError, match=r"x_train is \|S4 \(\); expected uint8"):
        Arrays(path=str(tmp_path / "a.npz")).load()


def test_weights_of_unbounded_compression_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "net.pth")
    with (
        zipfile.ZipFile(tmp_path / "net.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_BZIP2) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert read_weights(tmp_path / "net.pth")["w"].shape == (1000,)
    with pytest.raises(UserError, match="another method than deflate"):
        read_weights(tmp_path / "bomb.pth")


def _pickle_bomb(depth: int) -> bytes:
    """A pickled dictionary whose key has 2**depth objects, in a few bytes."""
    tuples = [b"h%bh%b\x86q%b" % (bytes([i]), bytes([i]), bytes([i + 1])) for i in range(depth)]
    return b"\x80\x02](K\x00\x85q\x00" + b"".join(tuples) + b"e}h" + bytes([depth]) + b"K\x01s\x86."


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_bomb_is_refused(legacy: bool, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "plain.pth", _use_new_zipfile_serialization=not legacy)
    read_weights(tmp_path / "plain.pth")
    path = tmp_path / "bomb.pth"
    if legacy:
        content = (tmp_path / "plain.pth").read_bytes()
        path.write_bytes(content[: content.index(b"\x80\x02}")] + _pickle_bomb(60))
    else:
        with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(path, "w") as bomb:
            for name in plain.namelist():
                bomb.writestr(name, _pickle_bomb(60) if name.endswith("data.pkl") else plain.read(name))
    with pytest.raises(
        UserError, match=r"^weights=.*: a pickle bomb: more than 10,000,000 objects in a few bytes"
    ):
        read_weights(path)


REFUSED_YAML: dict[str, tuple[str, str]] = {
    "a bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "holds an alias"),
    "a loop": ("a: &a {x: *a}\n", "holds an alias"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, "nested more than 30 deep"),
    "many values": ("[" + "1," * 20_000 + "]", "more than 10,000 keys and values"),
    "long": ("#" * (MAX_YAML_CHARACTERS + 1), "longer than 1,048,576 characters"),
    "code": ("a: !!python/object/apply:os.abort []\n", "not plain YAML"),
    "torn": ("a: [1", "not plain YAML"),
    "a large number": ("a: " + "1" * 10_000, "Exceeds the limit"),
    "control characters": ("a: \x07", "not plain YAML"),
}


@pytest.mark.parametrize("kind", REFUSED_YAML)
def test_yaml_that_is_not_plain_is_refused(kind: str) -> None:
    text, message = REFUSED_YAML[kind]
    with pytest.raises(ValueError, match=message):
        plain_yaml(text)


def test_plain_yaml_is_read_without_resolving_interpolations() -> None:
    text = "a: {b: [1, 0.5, null], c: '${oc.env:HOME}'}\n"
    assert plain_yaml(text) == {"a": {"b": [1, 0.5, None], "c": "${oc.env:HOME}"}}


def test_the_size_of_a_link_is_that_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    assert regular_size(tmp_path / "link") == 5
