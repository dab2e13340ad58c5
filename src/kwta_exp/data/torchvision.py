"""The usual benchmarks, downloaded and read by torchvision."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import dataclasses

from kwta_exp.data.base import Dataset, Images, Int64, UInt8, channels_first
from kwta_exp.errors import UserError
from kwta_exp.fields import STRICT
from kwta_exp.storage import sha256_of_file, sha256_of_json


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class _Torchvision(Dataset):
    """A dataset of torchvision.

    Args:
        root: the folder that holds torchvision's folders; it must exist.
        download: download missing files, checked against torchvision's checksums.
    """

    root: str
    download: bool = True

    _NAME: ClassVar[str]
    _FOLDER: ClassVar[str]
    _SHAPE: ClassVar[tuple[int, int, int]] = (3, 32, 32)
    _CLASSES: ClassVar[int] = 10
    _FILES: ClassVar[Mapping[str, str | None]]
    """File names below the folder; with a SHA-256 where torchvision does not check the file on reading."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._SHAPE

    @property
    def classes(self) -> int:
        return self._CLASSES

    @property
    def downloadable(self) -> bool:
        return True

    def present(self) -> bool:
        return all((Path(self.root) / self._FOLDER / name).is_file() for name in self._FILES)

    def fingerprint(self) -> str:
        folder = Path(self.root) / self._FOLDER
        if not Path(self.root).is_dir():
            raise UserError(
                f"dataset.root={self.root} (paths.data): no such folder; expected the parent of {self._FOLDER}."
                f" To download into a new one: mkdir -p {self.root}"
            )
        if not self.present():
            self._fetch()
        found = {name: sha256_of_file(folder / name) for name in self._FILES}
        for name, expected in self._FILES.items():
            if expected is not None and found[name] != expected:
                raise UserError(
                    f"dataset.root: {folder / name} is damaged (SHA-256 {found[name][:16]}...,"
                    f" expected {expected[:16]}...); delete it to download it again"
                )
        return sha256_of_json(found)

    def load(self) -> Images:
        train, test = self._read(train=True), self._read(train=False)
        return Images(_pixels(train), _labels(train), _pixels(test), _labels(test))

    def _fetch(self) -> None:
        if not self.download:
            raise UserError(
                f"dataset.root={self.root} (paths.data): {self._NAME} is missing"
                f" (expected {self._FOLDER}) and dataset.download=false"
            )
        for train in (True, False):
            self._read(train=train, download=True)

    def _read(self, train: bool, download: bool = False) -> Any:
        import torchvision.datasets

        part: dict[str, Any] = {"train": train}
        if self._NAME == "SVHN":
            part = {"split": "train" if train else "test"}
        root = Path(self.root) / (self._FOLDER if self._NAME == "SVHN" else "")  # the others add it
        try:
            return getattr(torchvision.datasets, self._NAME)(root, **part, download=download)
        except (RuntimeError, OSError, ValueError) as error:
            doing = "downloading" if download else "reading"
            raise UserError(
                f"dataset.root={self.root} (paths.data): {doing} {self._NAME} failed: {error}."
                f" Expected the files of {self._FOLDER} there, or a network to download them from"
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class FashionMNIST(_Torchvision):
    """FashionMNIST: 60,000 + 10,000 grey images of clothes, 28x28 (Xiao, Rasul, Vollgraf 2017)."""

    _NAME: ClassVar[str] = "FashionMNIST"
    _FOLDER: ClassVar[str] = "FashionMNIST/raw"
    _SHAPE: ClassVar[tuple[int, int, int]] = (1, 28, 28)
    _FILES: ClassVar[Mapping[str, str | None]] = {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    }


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class CIFAR10(_Torchvision):
    """CIFAR-10: 50,000 + 10,000 colour images, 32x32 (Krizhevsky 2009).

    torchvision verifies the checksum of every file each time it reads them.
    """

    _NAME: ClassVar[str] = "CIFAR10"
    _FOLDER: ClassVar[str] = "cifar-10-batches-py"
    _FILES: ClassVar[Mapping[str, str | None]] = {f"data_batch_{i}": None for i in range(1, 6)} | {
        "test_batch": None,
        "batches.meta": None,
    }


_IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class MNIST(_Torchvision):
    """MNIST: 60,000 + 10,000 grey handwritten digits, 28x28 (LeCun, Cortes and Burges 1998)."""

    _NAME: ClassVar[str] = "MNIST"
    _FOLDER: ClassVar[str] = "MNIST/raw"
    _SHAPE: ClassVar[tuple[int, int, int]] = (1, 28, 28)
    _FILES: ClassVar[Mapping[str, str | None]] = dict.fromkeys(_IDX)


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class CIFAR100(_Torchvision):
    """CIFAR-100: 50,000 + 10,000 colour images of 100 classes, 32x32 (Krizhevsky 2009).

    torchvision verifies the checksum of every file each time it reads them.
    """

    _NAME: ClassVar[str] = "CIFAR100"
    _FOLDER: ClassVar[str] = "cifar-100-python"
    _CLASSES: ClassVar[int] = 100
    _FILES: ClassVar[Mapping[str, str | None]] = dict.fromkeys(("train", "test", "meta"))


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class SVHN(_Torchvision):
    """Street View House Numbers, cropped: 73,257 + 26,032 colour digits, 32x32 (Netzer et al. 2011).

    torchvision verifies the checksum of both files each time it reads them.
    """

    _NAME: ClassVar[str] = "SVHN"
    _FOLDER: ClassVar[str] = "SVHN"
    _FILES: ClassVar[Mapping[str, str | None]] = dict.fromkeys(("train_32x32.mat", "test_32x32.mat"))


def _pixels(dataset: Any) -> UInt8:
    """uint8 ``(N, C, H, W)``, the layout of SVHN; the others have channels last or none."""
    x = np.asarray(dataset.data)
    return x if x.ndim == 4 and x.shape[1] == 3 else channels_first(x)


def _labels(dataset: Any) -> Int64:
    return np.asarray(dataset.labels if hasattr(dataset, "labels") else dataset.targets, dtype=np.int64)
