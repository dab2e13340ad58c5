"""Folders of images: found, read, cropped by each image's own key, in order, with or without workers."""

import errno
import os
import signal
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kwta_exp.config import user_errors
from kwta_exp.data.batches import TrainingBatches, first_test_images, split_training
from kwta_exp.data.image_folder import ImageFolder
from kwta_exp.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of images of one grey each, of many sizes; one class has no test image."""
    for part, classes in (("train", "abc"), ("val", "ac")):
        for number, name in enumerate(classes):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                grey = 40 * ("abc".index(name)) + 10 * i + 5
                size = (30 + 7 * i, 50 - 5 * number, 3)
                Image.fromarray(np.full(size, grey, np.uint8)).save(tmp_path / part / name / f"{i}.png")
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    return tmp_path


def dataset(root: Path, workers: int = 0) -> ImageFolder:
    return ImageFolder(root=str(root), image_size=16, workers=workers, flip=True, val_fraction=0.2)


def test_labels_are_numbered_by_the_training_classes(root: Path) -> None:
    images = dataset(root).load()
    assert images.y_train.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images.y_test.tolist() == [0] * 4 + [2] * 4
    assert (images.num_classes, images.in_channels, images.image_size) == (3, 3, (16, 16))
    shown = first_test_images(images, None, CPU)
    assert shown.x[torch.arange(8)].shape == (8, 3, 16, 16)
    greys = shown.x[torch.arange(8)].float().mean((1, 2, 3))
    assert torch.equal(greys, (40 * shown.y + 10 * (shown.index % 4) + 5).float())


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_a_function_of_seed_and_epoch(root: Path, workers: int) -> None:
    train, val = split_training(dataset(root, workers).load(), None, 0.2, 0, CPU)
    assert (len(train), len(val)) == (10, 2)
    assert next(iter(val.batches(8, 0))).x.shape == (2, 3, 16, 16)
    batches = TrainingBatches(train, 4, 0, True, seed=0)
    first, again = ([batch.x for batch in batches.epoch(0)] for _ in range(2))
    assert [len(x) for x in first] == [4, 4, 2]
    assert all(map(torch.equal, first, again))
    assert torch.equal(next(batches.epoch(0, start=1)).x, first[1])
    plain, _ = split_training(dataset(root, 0).load(), None, 0.2, 0, CPU)
    unhurried = TrainingBatches(plain, 4, 0, True, seed=0).epoch(0)
    assert all(torch.equal(x, batch.x) for x, batch in zip(first, unhurried, strict=True))


def test_crops_differ_between_images_and_epochs(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint8)[:, None] * 4, (1, 64))
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.stack([ramp, ramp.T, ramp], 2)).save(tmp_path / part / "a" / f"{i}.png")
    train, _ = split_training(dataset(tmp_path).load(), None, 0.2, 0, CPU)
    batches = TrainingBatches(train, 4, 0, True, seed=0)
    state = torch.get_rng_state()
    seen = [batch.x for epoch in range(2) for batch in batches.epoch(epoch)]
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(seen[0][0], seen[0][1])
    assert not torch.equal(seen[0], seen[1])


def test_fingerprint_depends_on_names_and_sizes(root: Path) -> None:
    before = dataset(root).fingerprint()
    assert dataset(root).fingerprint() == before
    (root / "train" / "a" / "0.png").rename(root / "train" / "a" / "9.png")
    assert dataset(root).fingerprint() != before


def test_fingerprint_depends_on_pixels_of_equal_file_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(grey: int) -> str:
        for part in ("train", "val"):
            (tmp_path / part / "a").mkdir(parents=True, exist_ok=True)
            for i in range(2):
                Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(tmp_path / part / "a" / f"{i}.bmp")
        return dataset(tmp_path).fingerprint()

    assert write(10) != write(20)
    monkeypatch.setattr("kwta_exp.data.image_folder.READ_WHOLE", 10)  # as if it were too large to read
    assert write(10) == write(20)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_error_message_with_and_without_workers(root: Path, workers: int) -> None:
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"torn")
    train, _ = split_training(dataset(root, workers).load(), None, 0.2, 0, CPU)
    with pytest.raises(UserError, match=r"^dataset\.root: .*cannot be read as an image") as caught:
        next(TrainingBatches(train, 4, 0, True, seed=0).epoch(0))
    assert "Traceback" not in str(caught.value)


def _png(width: int, height: int) -> bytes:
    """A valid PNG of one colour, small however large the image is."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" * (1 + (width + 7) // 8)) * min(height, 5000))
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo": (lambda path: os.mkfifo(path), "is a named pipe, not a file"),
    "socket": (_bind, "is a socket, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "folder": (lambda path: path.mkdir(), "is a folder, not a file"),
    "link to a folder": (lambda path: path.symlink_to("/"), "is a folder, not a file"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "is a broken link"),
    "loop": (lambda path: path.symlink_to(path.name), "is Too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_special_files_are_refused_without_opening_them(kind: str, root: Path) -> None:
    make, said = NO_FILES[kind]
    make(root / "train" / "b" / "z.png")
    with pytest.raises(UserError, match=rf"^dataset\.root: .*/train/b/z\.png {said}; expected an image$"):
        dataset(root).fingerprint()
    images = dataset(root).load()  # as a tool does that takes no fingerprint
    where = [path.name for path in images.x_train.files].index("z.png")
    with pytest.raises(UserError, match=rf"z\.png cannot be read as an image \({said[3:]}\)"):
        images.x_train[torch.tensor([where])]


def test_links_to_images_and_to_classes_are_followed(root: Path, tmp_path: Path) -> None:
    plain = dataset(root).load().x_train[:]
    farm = tmp_path / "farm"
    for part in ("train", "val"):
        (farm / part).mkdir(parents=True)
        (farm / part / "c").symlink_to(root / part / "c")
        for name in {"a", "b"} & {path.name for path in (root / part).iterdir()}:
            (farm / part / name).mkdir()
            for path in (root / part / name).glob("*.png"):
                (farm / part / name / path.name).symlink_to(path)
    assert torch.equal(dataset(farm).load().x_train[:], plain)
    assert dataset(farm).fingerprint() == dataset(root).fingerprint()


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot identify image file"),
    "text": (b"no image", "cannot identify image file"),
    "torn": (_png(64, 64)[:45], ""),
    "another checksum": (_png(64, 64).replace(b"IDAT", b"IDAU"), ""),
    "a bomb": (_png(40_000, 40_000), "exceeds limit"),
    "many pixels": (_png(13_000, 11_000), "13000 x 11000 pixels; expected at most 134,217,728 in all"),
    "a strip": (_png(1_000_000, 1), "18 x 18000000 pixels"),
    "no pixels": (b"P6 0 0 255\n", ""),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_and_huge_images_are_one_error_message(kind: str, root: Path) -> None:
    content, said = DAMAGED[kind]
    (root / "val" / "a" / "0.png").write_bytes(content)
    images = dataset(root).load()
    with pytest.raises(UserError, match=r"^dataset\.root: .*0\.png cannot be read as an image \(") as caught:
        images.x_test[torch.tensor([0])]
    assert said in str(caught.value)


def test_a_large_image_is_read(root: Path) -> None:
    (root / "val" / "a" / "0.png").write_bytes(_png(5000, 5000))
    assert dataset(root).load().x_test[torch.tensor([0])].shape == (1, 3, 16, 16)


def test_unreadable_files_are_one_error_message(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path, *args: object, **kwargs: object) -> object:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # root may read everything, so the refusal is made up
        patch.setattr("os.scandir", deny)
        with pytest.raises(UserError, match=r"dataset\.root=.*/train/a cannot be read: Permission denied"):
            dataset(root).fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr("kwta_exp.data.image_folder.sha256_of_file", deny)
        with pytest.raises(UserError, match=r"dataset\.root: .*0\.png cannot be read: Permission denied"):
            dataset(root).fingerprint()
    images = dataset(root).load()
    monkeypatch.setattr("PIL.Image.open", deny)
    with pytest.raises(UserError, match=r"0\.png cannot be read as an image .*Permission denied"):
        images.x_train[torch.tensor([0])]


def test_a_class_that_is_a_broken_link_is_an_error(root: Path) -> None:
    (root / "train" / "d").symlink_to("nowhere")
    with pytest.raises(UserError, match="train/d is a broken link"):
        dataset(root).load()


def test_a_dead_worker_ends_the_run_with_one_error_message(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = dataset(root, workers=1).load().x_train
    main = os.getpid()

    def dies(path: Path, size: int) -> None:
        assert os.getpid() != main
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("kwta_exp.data.image_folder._centred", dies)
    with pytest.raises(UserError, match=r"^dataset\.workers=1: a process that reads images died"):
        list(pixels.stream([torch.arange(3)], None))


def test_a_dead_worker_is_one_error_message_wherever_torch_raises_it() -> None:
    with (
        pytest.raises(UserError, match=r"^dataset\.workers: a process that reads images died"),
        user_errors(),
    ):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match=r"^other$"), user_errors():
        raise RuntimeError("other")


def test_error_messages_name_the_mistake(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.root=nowhere: no folder nowhere/train"):
        dataset(Path("nowhere")).fingerprint()
    (root / "val" / "stranger").mkdir()
    with pytest.raises(UserError, match="val has classes that train does not have: stranger"):
        dataset(root).load()
    (root / "val" / "stranger").rmdir()
    (root / "val" / "a" / "0.png").write_bytes(b"torn")
    images = first_test_images(dataset(root).load(), None, CPU)
    with pytest.raises(UserError, match=r"0\.png cannot be read as an image"):
        images.x[torch.arange(8)]
