"""Images in one folder per class, read from disk as needed: for data too large for memory."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, dataclasses

from kwta_exp.data.base import Dataset, Images, Int64
from kwta_exp.errors import UserError
from kwta_exp.fields import STRICT
from kwta_exp.received import regular_size
from kwta_exp.storage import sha256_of_file, sha256_of_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm"})

READ_WHOLE = 2**32
"""Bytes up to which the fingerprint covers the content of the files, not only their sizes."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
"""The formats to decode, whatever the file name says; Pillow starts other programs for some others (EPS)."""

MAX_PIXELS = 2**27
"""The most pixels in an image: 400 MB of memory."""

RESIZE_OVER_CROP = 256 / 224
"""Test images are resized to this multiple of the crop's side first (Krizhevsky et al. 2012)."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageFolder(Dataset):
    """``root/train/<class>/*`` and ``root/val/<class>/*``, such as ImageNet; ``val`` is the test set.

    Training images get a random crop of random scale (8 to 100% of the area) and aspect ratio (3/4 to 4/3),
    resized (Szegedy et al. 2015). Test images are resized to 8/7 of the crop's side and cropped in the
    middle. All are converted to RGB.

    Args:
        root: the folder with ``train`` and ``val``.
        image_size: side of the square crops, in pixels.
        workers: processes that read ahead; 0 reads in the main process.
        crop_padding: has no effect.
        flip: mirror training images with probability 1/2.
    """

    root: str
    image_size: PositiveInt = 224
    workers: NonNegativeInt = 8

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.image_size, self.image_size

    def present(self) -> bool:
        return all((Path(self.root) / part).is_dir() for part in ("train", "val"))

    def fingerprint(self) -> str:
        """Hex SHA-256 of all paths below ``root`` and contents; of paths and sizes where there are more than
        :data:`READ_WHOLE` bytes, since reading terabytes takes hours.
        """
        sizes = {
            part: [
                (str(path.relative_to(self.root)), _size(path)) for path in _listing(Path(self.root), part)[0]
            ]
            for part in ("train", "val")
        }
        listed = [entry for part in sizes.values() for entry in part]
        if sum(size for _, size in listed) > READ_WHOLE:
            return sha256_of_json([sizes, self.image_size])
        try:
            content = {name: sha256_of_file(Path(self.root) / name) for name, _ in listed}
        except OSError as error:
            raise UserError(f"dataset.root: {error.filename} cannot be read: {error.strerror}") from error
        return sha256_of_json([content, self.image_size])

    def load(self) -> Images:
        (train, y_train, classes), (test, y_test, judged) = (
            _listing(Path(self.root), part) for part in ("train", "val")
        )
        if unknown := sorted(set(judged) - set(classes)):
            raise UserError(
                f"dataset.root={self.root}: val has classes that train does not have: {', '.join(unknown[:5])};"
                " expected the same folders in both"
            )
        places = np.array([classes.index(name) for name in judged], dtype=np.int64)
        x_train, x_test = (
            FolderPixels(paths, self.image_size, self.workers, self.flip) for paths in (train, test)
        )
        return Images(x_train, y_train, x_test, places[y_test])


def _listing(root: Path, part: str) -> tuple[list[Path], Int64, list[str]]:
    """The image files of one part, their labels, and the names of the classes."""
    folder = root / part
    if not folder.is_dir():
        raise UserError(
            f"dataset.root={root}: no folder {folder}; expected train/<class>/* and val/<class>/* there"
        )
    try:
        classes = sorted(entry.name for entry in folder.iterdir() if _is_class(entry))
        found = [
            (path, label) for label, name in enumerate(classes) for path in sorted(_named_images(folder / name))
        ]
    except OSError as error:
        raise UserError(f"dataset.root={root}: {error.filename} cannot be read: {error.strerror}") from error
    if len(found) < 2:
        raise UserError(
            f"dataset.root={root}: {folder} holds {len(found)} images; expected <class>/*.jpg (or"
            f" {', '.join(sorted(EXTENSIONS))})"
        )
    return [path for path, _ in found], np.array([label for _, label in found], dtype=np.int64), classes


def _is_class(entry: Path) -> bool:
    if entry.is_symlink() and not entry.exists():
        raise UserError(f"dataset.root: {entry} is a broken link; expected a folder for each class")
    return entry.is_dir()


def _named_images(folder: Path) -> Iterator[Path]:
    """All files below ``folder`` with an image's extension; links to folders are not followed."""

    def fail(error: OSError) -> None:
        raise error  # os.walk would skip the folder silently

    for here, folders, files in os.walk(folder, onerror=fail):
        for name in (*folders, *files):
            if (path := Path(here, name)).suffix.lower() in EXTENSIONS:
                yield path


def _size(path: Path) -> int:
    try:
        return regular_size(path)
    except ValueError as error:
        raise UserError(f"dataset.root: {path} is {error}; expected an image") from error


@dataclass(frozen=True)
class FolderPixels:
    """Used like a uint8 tensor ``(N, 3, S, S)``, but reads the images from their files."""

    files: Sequence[Path]
    size: int
    workers: int
    flip: bool
    device: Any = "cpu"

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), 3, self.size, self.size

    def subset(self, index: "Tensor", device: "torch.device") -> "FolderPixels":
        """The images at ``index``, to be loaded onto ``device``."""
        return FolderPixels([self.files[i] for i in index.tolist()], self.size, self.workers, self.flip, device)

    def __getitem__(self, index: "Tensor | slice") -> "Tensor":
        """The images at ``index``, without augmentation."""
        import torch

        places = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return torch.stack([self.read(i, None) for i in places]).to(self.device)

    def read(self, place: int, key: int | None) -> "Tensor":
        """The image at ``place``, augmented by the random ``key``, or without augmentation for ``None``.

        Raises:
            UserError: if the file is not a readable image; names it.
        """
        path = self.files[place]
        try:
            return _centred(path, self.size) if key is None else _augmented(path, self, key)
        except Exception as error:  # damaged bytes can raise anything
            raise UserError(
                f"dataset.root: {path} cannot be read as an image ({error}); expected {', '.join(FORMATS)}"
            ) from error

    def stream(self, chunks: Sequence["Tensor"], keys: Sequence["Tensor"] | None) -> Iterator["Tensor"]:
        """The images of each chunk, read ahead by worker processes.

        Args:
            chunks: positions ``(n,)`` of each batch.
            keys: a random key for each image, for its crop and flip; ``None`` for no augmentation.
        """
        import torch
        from torch.utils.data import DataLoader

        wanted = [
            list(zip(chunk.tolist(), own.tolist() if own is not None else [None] * len(chunk), strict=True))
            for chunk, own in zip(chunks, keys if keys is not None else [None] * len(chunks), strict=True)
        ]
        loader: DataLoader[Any] = DataLoader(
            _Reader(self),  # type: ignore[arg-type]
            batch_sampler=wanted,
            num_workers=self.workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # else it draws from the global one
            pin_memory="cuda" in str(self.device),
        )
        try:
            for batch in loader:
                if isinstance(batch, UserError):
                    raise batch
                yield batch.to(self.device, non_blocking=True)
        except RuntimeError as error:
            if not is_death_of_worker(error):
                raise
            raise UserError(f"dataset.workers={self.workers}: {DEATH_OF_WORKER} ({error})") from error


DEATH_OF_WORKER = "a process that reads images died, perhaps for lack of memory; expected fewer workers"


def is_death_of_worker(error: BaseException) -> bool:
    """Whether a process that reads images died. torch raises this in whichever line runs at the time."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


@dataclass(frozen=True)
class _Reader:
    """The dataset of the worker processes: reads the image of a (position, key)."""

    pixels: FolderPixels

    def __getitem__(self, wanted: tuple[int, int | None]) -> "Tensor | UserError":
        try:
            return self.pixels.read(*wanted)
        except UserError as error:
            return error  # raised in the main process, where it is one message


def _collate(items: "list[Tensor | UserError]") -> "Tensor | UserError":
    import torch

    for item in items:
        if isinstance(item, UserError):
            return item
    return torch.stack(items)  # type: ignore[arg-type]


def _open(path: Path) -> Any:
    from PIL import Image

    regular_size(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _require_size checks
        with Image.open(path, formats=FORMATS) as image:
            _require_size(image.width, image.height)
            return image.convert("RGB")


def _require_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels; expected at most {MAX_PIXELS:,} in all")


def _centred(path: Path, size: int) -> "Tensor":
    from torchvision.transforms import functional as transforms

    image, side = _open(path), round(size * RESIZE_OVER_CROP)
    _require_size(side, side * max(image.size) // min(image.size))  # the longer side grows by as much
    image = transforms.resize(image, side)
    pixels: Tensor = transforms.pil_to_tensor(transforms.center_crop(image, size))
    return pixels


def _augmented(path: Path, pixels: FolderPixels, key: int) -> "Tensor":
    import torch
    from torchvision.transforms import RandomResizedCrop
    from torchvision.transforms import functional as transforms

    image = _open(path)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator; a worker has no CUDA
        torch.manual_seed(key)
        place = RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
        mirrored = pixels.flip and torch.rand(()).item() < 0.5
    image = transforms.resized_crop(image, *place, size=[pixels.size, pixels.size])
    cropped: Tensor = transforms.pil_to_tensor(transforms.hflip(image) if mirrored else image)
    return cropped
