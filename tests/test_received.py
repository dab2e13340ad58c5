"""Files from strangers: what is no file, or would fill the memory, is refused before it is read."""

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
from kwta_exp.received import MOST_EXPANDED, MOST_YAML, plain_yaml, regular_size, require_plain
from kwta_exp.settings import Inputs, Paths


def inputs_for(path: Path) -> Inputs:
    paths = Paths(data=str(path.parent), outputs=str(path.parent))
    return Inputs(weights=str(path), weights_sha256=None, trust=False, paths=paths)


READERS: dict[str, Callable[[Path], object]] = {
    "dataset.path": lambda path: Arrays(path=str(path)).load(),
    "dataset.path, its fingerprint": lambda path: Arrays(path=str(path)).fingerprint(),
    "weights": lambda path: find_weights(inputs_for(path)),
    "weights, read": read_weights,
    "a record": lambda path: Record.read(path, CLEAN_COLUMNS),
}

NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo": (lambda path: os.mkfifo(path), "a named pipe, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device, not a file"),
    "loop": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize(
    ("reader", "kind"),
    [(reader, kind) for reader in READERS for kind in NO_FILES],
)
def test_what_is_no_file_is_one_message_and_is_never_opened(reader: str, kind: str, tmp_path: Path) -> None:
    make, said = NO_FILES[kind]
    path = tmp_path / "it.npz"
    make(path)
    with pytest.raises(UserError, match=said) as caught:
        READERS[reader](path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("reader", ["dataset.path, its fingerprint", "weights", "weights, read"])
@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "a\0b", ""], ids=["missing", "long", "nul", "empty"])
def test_a_name_that_no_file_has_is_one_message(reader: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^(dataset\.path|weights)="):
        READERS[reader](tmp_path / name)


def _bomb(path: Path, sizes: dict[str, int], method: int = zipfile.ZIP_DEFLATED) -> None:
    """An archive whose members say that they hold so many bytes, without a disk that does."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in sizes:
            archive.writestr(name, b"\0" * 1000)
    content = path.read_bytes()
    for size in sizes.values():
        content = content.replace((1000).to_bytes(4, "little"), size.to_bytes(4, "little"), 2)
    path.write_bytes(content)


@pytest.mark.parametrize("reader", ["dataset.path", "weights, read", "a record"])
def test_an_archive_that_would_fill_the_memory_is_refused(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    _bomb(path, {"x_train.npy": 3_000_000_000, "x_test.npy": 3_000_000_000})
    with pytest.raises(UserError, match=r"bytes that expand to 6,000,000,000; expected"):
        READERS[reader](path)


def test_an_archive_may_expand_to_what_memory_holds(tmp_path: Path) -> None:
    path = tmp_path / "fine.npz"
    _bomb(path, {"x_train.npy": 3_000_000_000})
    require_plain(path)
    assert MOST_EXPANDED > 3_000_000_000


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_packed_without_bounds_is_refused(method: int, tmp_path: Path) -> None:
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
    "more than there are numbers": _npy((2**62, 2**62)),
    "negative": _npy((-1, 5)),
    "objects": _npy((1,), "|O", pickle.dumps(np.array([print], dtype=object))),
    "no header": b"\x93NUMPY\x01\x00\xff\xff",
    "a long header": b"\x93NUMPY\x02\x00" + (2**20).to_bytes(4, "little") + b"(" * 2**20,
    "code for a header": b"\x93NUMPY\x01\x00"
    + (64).to_bytes(2, "little")
    + b"__import__('os').abort()".ljust(64),
    "a version to come": b"\x93NUMPY\x09\x00" + b"\0" * 100,
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_is_none_is_one_message(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", ARRAYS[kind])
    with pytest.raises(UserError, match=r"^dataset\.path=.*: not a readable \.npz of plain arrays"):
        Arrays(path=str(path)).load()


@pytest.mark.parametrize(
    "content", [_npy((1,), data=b"\0"), bz2.compress(b"\0" * 10**6), b"", b"PK\x05\x06" + b"\xff" * 18]
)
def test_what_is_no_npz_is_one_message(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^dataset\.path=.*: not a readable \.npz of plain arrays"):
        Arrays(path=str(path)).load()


def test_bytes_that_are_no_array_are_said_to_be_none(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", b"none")
    with pytest.raises(UserError, match=r"x_train is \|S4 \(\); expected uint8"):
        Arrays(path=str(tmp_path / "a.npz")).load()


def test_a_packed_bomb_of_weights_is_refused(tmp_path: Path) -> None:
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


def _tangle(depth: int) -> bytes:
    """A dictionary with a key of 2**depth objects, in a few bytes."""
    tuples = [b"h%bh%b\x86q%b" % (bytes([i]), bytes([i]), bytes([i + 1])) for i in range(depth)]
    return b"\x80\x02](K\x00\x85q\x00" + b"".join(tuples) + b"e}h" + bytes([depth]) + b"K\x01s\x86."


@pytest.mark.parametrize("legacy", [True, False])
def test_weights_that_take_for_ever_to_hash_are_refused(legacy: bool, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "plain.pth", _use_new_zipfile_serialization=not legacy)
    read_weights(tmp_path / "plain.pth")
    path = tmp_path / "tangled.pth"
    if legacy:
        content = (tmp_path / "plain.pth").read_bytes()
        path.write_bytes(content[: content.index(b"\x80\x02}")] + _tangle(60))
    else:
        with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(path, "w") as tangled:
            for name in plain.namelist():
                tangled.writestr(name, _tangle(60) if name.endswith("data.pkl") else plain.read(name))
    with pytest.raises(UserError, match=r"^weights=.*: more than 10,000,000 objects in a few bytes"):
        read_weights(path)


NO_YAML: dict[str, tuple[str, str]] = {
    "a bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "holds an alias"),
    "a loop": ("a: &a {x: *a}\n", "holds an alias"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000, "nested more than 30 deep"),
    "many values": ("[" + "1," * 20_000 + "]", "more than 10,000 keys and values"),
    "long": ("#" * (MOST_YAML + 1), "longer than 1,048,576 characters"),
    "code": ("a: !!python/object/apply:os.abort []\n", "no plain YAML"),
    "torn": ("a: [1", "no plain YAML"),
    "a large number": ("a: " + "1" * 10_000, "Exceeds the limit"),
    "control characters": ("a: \x07", "no plain YAML"),
}


@pytest.mark.parametrize("kind", NO_YAML)
def test_yaml_that_is_no_plain_one_is_refused(kind: str) -> None:
    text, said = NO_YAML[kind]
    with pytest.raises(ValueError, match=said):
        plain_yaml(text)


def test_plain_yaml_is_read_and_nothing_of_it_resolved() -> None:
    text = "a: {b: [1, 0.5, null], c: '${oc.env:HOME}'}\n"
    assert plain_yaml(text) == {"a": {"b": [1, 0.5, None], "c": "${oc.env:HOME}"}}


def test_a_link_to_a_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    assert regular_size(tmp_path / "link") == 5
