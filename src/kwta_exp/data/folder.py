"""Images in folders, one a class, read from disk as they are needed: for data that memory cannot hold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import dataclasses

from kwta_exp.data.base import Dataset, Images, Int64
from kwta_exp.errors import UserError
from kwta_exp.fields import STRICT, Count, Natural
from kwta_exp.storage import sha256_of_file, sha256_of_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm"})

READ_WHOLE = 2**32
"""Datasets of up to so many bytes are told apart by their content."""

RESIZE_OVER_CROP = 256 / 224
"""Judged images are resized to this multiple of the crop's side first (Krizhevsky et al. 2012)."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageFolder(Dataset):
    """``root/train/<class>/*`` and ``root/val/<class>/*``, such as ImageNet; ``val`` is what is judged.

    Training images are cropped at a random place, scale (8 to 100% of the area) and aspect (3/4 to 4/3)
    and resized (Szegedy et al. 2015), with randomness of each image's own; judged ones are resized to
    8/7 of the crop's side and cropped in the middle. Colour images only; others are converted.

    Args:
        root: the folder with ``train`` and ``val``.
        image_size: side of the square crops, in pixels.
        workers: processes that read ahead; 0 reads in the main one.
        crop_padding: has no effect here.
        flip: mirror half of the training images.
    """

    root: str
    image_size: Count = 224
    workers: Natural = 8

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.image_size, self.image_size

    def present(self) -> bool:
        return all((Path(self.root) / part).is_dir() for part in ("train", "val"))

    def fingerprint(self) -> str:
        """Hex SHA-256 of every file's path below ``root`` and its content, or, where there are more than
        :data:`READ_WHOLE` bytes in all, its size (reading terabytes would take hours).
        """
        listing = {part: _listing(Path(self.root), part) for part in ("train", "val")}
        sizes = {
            part: [(str(path.relative_to(self.root)), path.stat().st_size) for path in paths]
            for part, (paths, _, _) in listing.items()
        }
        listed = [entry for part in sizes.values() for entry in part]
        if sum(size for _, size in listed) > READ_WHOLE:
            return sha256_of_json([sizes, self.image_size])
        content = {name: sha256_of_file(Path(self.root) / name) for name, _ in listed}
        return sha256_of_json([content, self.image_size])

    def load(self) -> Images:
        (train, y_train, classes), (test, y_test, judged) = (
            _listing(Path(self.root), part) for part in ("train", "val")
        )
        if strangers := sorted(set(judged) - set(classes)):
            raise UserError(
                f"dataset.root={self.root}: val has classes that train lacks: {', '.join(strangers[:5])};"
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
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in EXTENSIONS
    ]
    if len(found) < 2:
        raise UserError(
            f"dataset.root={root}: {folder} holds {len(found)} images; expected <class>/*.jpg (or"
            f" {', '.join(sorted(EXTENSIONS))})"
        )
    return [path for path, _ in found], np.array([label for _, label in found], dtype=np.int64), classes


@dataclass(frozen=True)
class FolderPixels:
    """Stands where a tensor of uint8 images ``(N, 3, S, S)`` would; reads what it is asked for."""

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
        """Those at ``index``, delivered to ``device``."""
        return FolderPixels([self.files[i] for i in index.tolist()], self.size, self.workers, self.flip, device)

    def __getitem__(self, index: "Tensor | slice") -> "Tensor":
        """The images at ``index``, as they are judged."""
        import torch

        places = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return torch.stack([_judged(self.files[i], self.size) for i in places]).to(self.device)

    def stream(self, chunks: Sequence["Tensor"], keys: Sequence["Tensor"] | None) -> Iterator["Tensor"]:
        """The images of each chunk in turn, read ahead by worker processes.

        Args:
            chunks: positions ``(n,)`` of each batch.
            keys: a random key an image for its crop and flip; ``None`` reads them as they are judged.
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
            generator=torch.Generator(),  # or it draws from the global one
            pin_memory="cuda" in str(self.device),
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class _Reader:
    """What a worker process runs: one image for a (position, key)."""

    pixels: FolderPixels

    def __getitem__(self, wanted: tuple[int, int | None]) -> "Tensor | UserError":
        place, key = wanted
        path = self.pixels.files[place]
        try:
            return _judged(path, self.pixels.size) if key is None else _augmented(path, self.pixels, key)
        except UserError as error:
            return error  # raised in the main process, as one message


def _collate(items: "list[Tensor | UserError]") -> "Tensor | UserError":
    import torch

    for item in items:
        if isinstance(item, UserError):
            return item
    return torch.stack(items)  # type: ignore[arg-type]


def _open(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"dataset.root: {path} cannot be read as an image ({error})") from error


def _judged(path: Path, size: int) -> "Tensor":
    from torchvision.transforms import functional as transforms

    image = transforms.resize(_open(path), round(size * RESIZE_OVER_CROP))
    pixels: Tensor = transforms.pil_to_tensor(transforms.center_crop(image, size))
    return pixels


def _augmented(path: Path, pixels: FolderPixels, key: int) -> "Tensor":
    import torch
    from torchvision.transforms import RandomResizedCrop
    from torchvision.transforms import functional as transforms

    image = _open(path)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's generator; no CUDA in a worker
        torch.manual_seed(key)
        place = RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
        mirrored = pixels.flip and torch.rand(()).item() < 0.5
    image = transforms.resized_crop(image, *place, size=[pixels.size, pixels.size])
    cropped: Tensor = transforms.pil_to_tensor(transforms.hflip(image) if mirrored else image)
    return cropped
