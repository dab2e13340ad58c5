"""Datasets as whole uint8 arrays, each with a fingerprint of its content.

Nothing here imports torch until images must be fetched, so that a run which is finished, or which
names a folder that does not exist, says so at once.
"""

import hashlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import dataclasses

from kwta_exp.errors import UserError
from kwta_exp.fields import STRICT, Natural, Share
from kwta_exp.storage import sha256_of_file, sha256_of_json

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """A dataset in memory: uint8 images ``(N, C, H, W)`` and int64 labels ``(N,)`` from 0."""

    x_train: UInt8
    y_train: Int64
    x_test: UInt8
    y_test: Int64

    @property
    def num_classes(self) -> int:
        """One more than the largest label of either part."""
        return int(max(self.y_train.max(), self.y_test.max())) + 1

    @property
    def in_channels(self) -> int:
        return int(self.x_train.shape[1])

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width)."""
        return int(self.x_train.shape[2]), int(self.x_train.shape[3])


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Dataset(ABC):
    """What every dataset says of itself.

    Args:
        crop_padding: training images are padded by this many zeros on each side and cropped back at
            a random place; 0 for none. The k-WTA study used 4 on CIFAR-10.
        flip: mirror half of the training images.
        val_fraction: share of the training images held out to choose the best epoch.
    """

    crop_padding: Natural = 0
    flip: bool = False
    val_fraction: Share = 0.1

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex SHA-256 that changes with the content and with nothing else; fetches what is missing.

        Raises:
            UserError: if the data is neither there nor to be had, or is damaged.
        """

    @abstractmethod
    def load(self) -> Images:
        """Read everything into memory."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Digits(Dataset):
    """1,797 real 8x8 images of handwritten digits that come inside scikit-learn.

    scikit-learn gives no split: a fixed permutation sends 1,437 images to training and 360 to the
    test. The 17 grey levels 0..16 are stored as ``round(255 * level / 16)``.
    """

    _SHA256: ClassVar[str] = "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"

    def fingerprint(self) -> str:
        return self._SHA256

    def load(self) -> Images:
        # The file itself, not load_digits(): importing scikit-learn takes longer than this demo's first epochs.
        spec = importlib.util.find_spec("sklearn")
        assert spec
        assert spec.origin
        rows = np.loadtxt(Path(spec.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
        x = np.rint(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
        y = rows[:, -1].astype(np.int64)
        found = hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()
        if found != self._SHA256:
            raise UserError(f"dataset: scikit-learn's digits have SHA-256 {found}, expected {self._SHA256}")
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(x))
        train, test = order[:1437], order[1437:]
        return Images(x[train], y[train], x[test], y[test])


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class _Torchvision(Dataset):
    """A dataset that torchvision knows how to fetch and read.

    Args:
        root: the folder that holds torchvision's folders; it must exist.
        download: fetch what is missing there (checked against torchvision's checksums).
    """

    root: str
    download: bool = True

    _NAME: ClassVar[str]
    _FOLDER: ClassVar[str]
    _FILES: ClassVar[Mapping[str, str | None]]
    """File names below the folder, with the SHA-256 that torchvision itself would not check."""

    def fingerprint(self) -> str:
        folder = Path(self.root) / self._FOLDER
        if not Path(self.root).is_dir():
            raise UserError(
                f"dataset.root={self.root} (paths.data): no such folder; expected the one that holds"
                f" (or shall hold) {self._FOLDER}. To start with an empty one: mkdir -p {self.root}"
            )
        if not all((folder / name).is_file() for name in self._FILES):
            self._fetch()
        found = {name: sha256_of_file(folder / name) for name in self._FILES}
        for name, expected in self._FILES.items():
            if expected is not None and found[name] != expected:
                raise UserError(
                    f"dataset.root: {folder / name} is damaged (SHA-256 {found[name][:16]}...,"
                    f" expected {expected[:16]}...); delete it to have it fetched again"
                )
        return sha256_of_json(found)

    def load(self) -> Images:
        train, test = self._read(train=True), self._read(train=False)
        return Images(_channels_first(train.data), _labels(train), _channels_first(test.data), _labels(test))

    def _fetch(self) -> None:
        if not self.download:
            raise UserError(
                f"dataset.root={self.root} (paths.data): {self._NAME} is not there"
                f" (expected {self._FOLDER}) and dataset.download=false forbids fetching it"
            )
        for train in (True, False):
            self._read(train=train, download=True)

    def _read(self, train: bool, download: bool = False) -> Any:
        import torchvision.datasets

        try:
            return getattr(torchvision.datasets, self._NAME)(self.root, train=train, download=download)
        except (RuntimeError, OSError, ValueError) as error:
            doing = "fetching" if download else "reading"
            raise UserError(
                f"dataset.root={self.root} (paths.data): {doing} {self._NAME} failed: {error}."
                f" Expected the files of {self._FOLDER} there, or a network to fetch them from"
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class FashionMNIST(_Torchvision):
    """FashionMNIST: 60,000 + 10,000 grey images of clothes, 28x28 (Xiao, Rasul, Vollgraf 2017)."""

    _NAME: ClassVar[str] = "FashionMNIST"
    _FOLDER: ClassVar[str] = "FashionMNIST/raw"
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


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Arrays(Dataset):
    """Any images in one ``.npz`` file.

    Args:
        path: holds ``x_train``, ``y_train``, ``x_test``, ``y_test``: uint8 images ``(N, H, W)`` or
            ``(N, H, W, C)`` and integer labels ``(N,)`` counted from 0.
    """

    path: str

    def fingerprint(self) -> str:
        if not Path(self.path).is_file():
            raise UserError(
                f"dataset.path={self.path}: no such file; expected an .npz with"
                " x_train, y_train, x_test and y_test"
            )
        return sha256_of_file(Path(self.path))

    def load(self) -> Images:
        names = ("x_train", "y_train", "x_test", "y_test")
        try:
            # Pickled objects could run code, so they stay forbidden.
            with Path(self.path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                if missing := [name for name in names if name not in file]:
                    raise UserError(
                        f"dataset.path={self.path}: lacks {', '.join(missing)}; expected {', '.join(names)}"
                    )
                x_train, y_train, x_test, y_test = (file[name] for name in names)
        except UserError:
            raise
        except Exception as error:  # damaged bytes make the reader fail in any way whatever
            raise UserError(
                f"dataset.path={self.path}: not a readable .npz of plain arrays ({error})"
            ) from error
        for name, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
            self._check(name, x, y)
        if len(x_train) < 2:
            raise UserError(f"dataset.path={self.path}: x_train holds {len(x_train)} image; expected 2 or more")
        if x_train.shape[1:] != x_test.shape[1:]:
            raise UserError(
                f"dataset.path={self.path}: x_train has images of shape {x_train.shape[1:]},"
                f" x_test of {x_test.shape[1:]}; expected the same"
            )
        return Images(
            _channels_first(x_train),
            y_train.astype(np.int64),
            _channels_first(x_test),
            y_test.astype(np.int64),
        )

    def _check(self, part: str, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> None:
        where = f"dataset.path={self.path}"
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.size == 0:
            raise UserError(
                f"{where}: x_{part} is {x.dtype} {x.shape}; expected uint8 (N, H, W) or (N, H, W, C)"
            )
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            raise UserError(f"{where}: y_{part} is {y.dtype} {y.shape}; expected integers of shape ({len(x)},)")
        if y.min() < 0:
            raise UserError(f"{where}: y_{part} holds {y.min()}; expected labels counted from 0")


def _channels_first(images: Any) -> UInt8:
    """uint8 ``(N, H, W)`` or ``(N, H, W, C)`` to contiguous ``(N, C, H, W)``."""
    x = np.asarray(images)
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x)


def _labels(dataset: Any) -> Int64:
    return np.asarray(dataset.targets, dtype=np.int64)
