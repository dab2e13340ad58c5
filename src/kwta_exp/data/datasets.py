"""Datasets as whole uint8 arrays, each with a fingerprint of its content."""

import hashlib
import importlib.util
import itertools
import logging
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import PositiveInt, dataclasses

from kwta_exp.data.base import Dataset, Images, Int64, UInt8, channels_first
from kwta_exp.data.torchvision import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST
from kwta_exp.errors import UserError
from kwta_exp.fields import STRICT, AtLeastTwo
from kwta_exp.received import refuse_zip_bomb, regular_size
from kwta_exp.storage import sha256_of_file, sha256_of_json

log = logging.getLogger(__name__)

__all__ = [
    "CIFAR10", "CIFAR100", "MNIST", "SVHN", "Arrays", "Dataset", "Digits", "FashionMNIST", "Images",
    "Synthetic", "synthetic_like",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Digits(Dataset):
    """1,797 real 8x8 images of handwritten digits, part of scikit-learn.

    scikit-learn has no split; a fixed permutation gives 1,437 training and 360 test images. The grey levels
    0..16 become ``round(255 * level / 16)``.
    """

    _SHA256: ClassVar[str] = "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 8, 8

    def fingerprint(self) -> str:
        return self._SHA256

    def load(self) -> Images:
        # Not load_digits(): importing scikit-learn takes longer than the demo's first epochs.
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
class Arrays(Dataset):
    """Images in an ``.npz`` file.

    Args:
        path: holds ``x_train``, ``y_train``, ``x_test``, ``y_test``: uint8 images ``(N, H, W)`` or
            ``(N, H, W, C)`` and integer labels ``(N,)`` counted from 0.
    """

    path: str

    def present(self) -> bool:
        return Path(self.path).is_file()

    def fingerprint(self) -> str:
        try:
            regular_size(Path(self.path))
            return sha256_of_file(Path(self.path))
        except (OSError, ValueError) as error:
            raise UserError(
                f"dataset.path={self.path}: {error}; expected an .npz with x_train, y_train, x_test and y_test"
            ) from error

    def load(self) -> Images:
        names = ("x_train", "y_train", "x_test", "y_test")
        try:
            # Pickled objects could run code, so they stay forbidden.
            refuse_zip_bomb(Path(self.path))
            with Path(self.path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                if missing := [name for name in names if name not in file]:
                    raise UserError(
                        f"dataset.path={self.path}: has no {', '.join(missing)}; expected {', '.join(names)};"
                        f" found {', '.join(sorted(file)) or 'no array'}"
                    )
                # numpy returns a member that is not an array as bytes.
                x_train, y_train, x_test, y_test = (np.asarray(file[name]) for name in names)
        except UserError:
            raise
        except Exception as error:  # damaged bytes can raise anything
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
        self._check_classes(y_train, y_test)
        return Images(
            channels_first(x_train),
            y_train.astype(np.int64),
            channels_first(x_test),
            y_test.astype(np.int64),
        )

    def _check(self, part: str, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> None:
        where = f"dataset.path={self.path}"
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.size == 0:
            raise UserError(
                f"{where}: x_{part} is {x.dtype} {x.shape}; expected uint8 (N, H, W) or (N, H, W, C)"
            )
        if x.ndim == 4 and x.shape[3] not in _CHANNELS and x.shape[1] in _CHANNELS:
            raise UserError(
                f"{where}: x_{part} is {x.shape}: {x.shape[3]} channels of {x.shape[1]}x{x.shape[2]} pixels;"
                f" expected (N, H, W, C): save x_{part}.transpose(0, 2, 3, 1)"
            )
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            raise UserError(f"{where}: y_{part} is {y.dtype} {y.shape}; expected integers of shape ({len(x)},)")
        if y.min() < 0:
            raise UserError(f"{where}: y_{part} holds {y.min()}; expected labels counted from 0")

    def _check_classes(self, y_train: npt.NDArray[Any], y_test: npt.NDArray[Any]) -> None:
        """Require labels counted from 0, and warn of classes without training images, which may be intended."""
        trained = np.unique(y_train)
        lowest, classes = int(min(trained[0], y_test.min())), int(max(trained[-1], y_test.max())) + 1
        if lowest > 0:
            raise UserError(
                f"dataset.path={self.path}: the labels run from {lowest} to {classes - 1}; expected them"
                f" counted from 0: save y_train - {lowest} and y_test - {lowest}"
            )
        if (lacking := classes - len(trained)) > 0:
            present = set(trained.tolist())
            first = itertools.islice((k for k in range(classes) if k not in present), 5)
            log.warning(
                "dataset.path=%s: %d of %d classes have no training image (%s%s). The network has an output for"
                " every class up to the largest label; unless the gaps are intended, number the labels without"
                " gaps",
                self.path, lacking, classes, ", ".join(map(str, first)), ", ..." if lacking > 5 else "",
            )  # fmt: skip


_CHANNELS = (1, 2, 3, 4)
"""Usual numbers of channels."""

MAX_SYNTHETIC_VALUES = 2**28
"""The most values in all synthetic images; making them takes about 20 bytes a value."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Synthetic(Dataset):
    """Synthetic images, a pattern for each class plus noise, for trying commands out.

    Args:
        channels: channels of an image.
        image_size: side of the square images.
        num_classes: number of classes; image i has label i modulo this.
        train: number of training images.
        test: number of test images.
    """

    channels: PositiveInt = 3
    image_size: PositiveInt = 32
    num_classes: AtLeastTwo = 10
    train: AtLeastTwo = 256
    test: PositiveInt = 64

    def __post_init__(self) -> None:
        images = self.num_classes + self.train + self.test
        if (size := images * math.prod(self.shape)) > MAX_SYNTHETIC_VALUES:
            raise UserError(
                f"dataset: {images:,} synthetic images of shape {self.shape} have {size:,} values;"
                f" expected {MAX_SYNTHETIC_VALUES:,} at most"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size

    @property
    def classes(self) -> int:
        return self.num_classes

    def fingerprint(self) -> str:
        return sha256_of_json([*self.shape, self.num_classes, self.train, self.test])

    def load(self) -> Images:
        random = np.random.Generator(np.random.PCG64(0))
        patterns = random.uniform(64, 192, (self.num_classes, *self.shape))

        def part(size: int) -> tuple[UInt8, Int64]:
            y = np.arange(size, dtype=np.int64) % self.num_classes
            x = patterns[y] + random.normal(0, 32, (size, *self.shape))
            return x.clip(0, 255).astype(np.uint8), y

        (x_train, y_train), (x_test, y_test) = part(self.train), part(self.test)
        return Images(x_train, y_train, x_test, y_test)


def synthetic_like(dataset: Dataset) -> Synthetic:
    """Synthetic images with the shape, classes and augmentation of ``dataset``."""
    channels, image_size, _ = dataset.shape
    return Synthetic(
        channels=channels, image_size=image_size, num_classes=dataset.classes,
        train=max(256, 2 * dataset.classes), test=max(64, dataset.classes),
        crop_padding=dataset.crop_padding, flip=dataset.flip, train_n=dataset.train_n,
        val_fraction=dataset.val_fraction,
    )  # fmt: skip
