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
    """1,797 real 8x8 images of handwritten digits that come inside scikit-learn.

    scikit-learn gives no split: a fixed permutation sends 1,437 images to training and 360 to the
    test. The 17 grey levels 0..16 are stored as ``round(255 * level / 16)``.
    """

    _SHA256: ClassVar[str] = "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 8, 8

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
class Arrays(Dataset):
    """Any images in one ``.npz`` file.

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
                        f"dataset.path={self.path}: lacks {', '.join(missing)}; expected {', '.join(names)};"
                        f" found {', '.join(sorted(file)) or 'no array'}"
                    )
                # A member that is no array comes as bytes.
                x_train, y_train, x_test, y_test = (np.asarray(file[name]) for name in names)
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
        """Labels are counted from 0; a class without training images is said, since it may be meant."""
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
                "dataset.path=%s: no training image is of %d of %d classes (%s%s). The network has an output"
                " for each class up to the largest label; if none was meant to be left out, number the labels"
                " without gaps",
                self.path, lacking, classes, ", ".join(map(str, first)), ", ..." if lacking > 5 else "",
            )  # fmt: skip


_CHANNELS = (1, 2, 3, 4)
"""How many channels images have, but for unusual ones."""

MOST_SYNTHETIC = 2**28
"""Values of all synthetic images together; making them takes some 20 bytes each."""


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Synthetic(Dataset):
    """Images that nobody took: each class a pattern of its own, in noise. For trying commands out.

    Args:
        channels: of each image.
        image_size: side of the square images.
        num_classes: labels go round through them.
        train: training images.
        test: test images.
    """

    channels: PositiveInt = 3
    image_size: PositiveInt = 32
    num_classes: AtLeastTwo = 10
    train: AtLeastTwo = 256
    test: PositiveInt = 64

    def __post_init__(self) -> None:
        images = self.num_classes + self.train + self.test
        if (size := images * math.prod(self.shape)) > MOST_SYNTHETIC:
            raise UserError(
                f"dataset: {images:,} synthetic images of shape {self.shape} have {size:,} values;"
                f" expected {MOST_SYNTHETIC:,} at most"
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
    """Synthetic images of the shape and classes of ``dataset``, augmented as it is."""
    channels, image_size, _ = dataset.shape
    return Synthetic(
        channels=channels, image_size=image_size, num_classes=dataset.classes,
        train=max(256, 2 * dataset.classes), test=max(64, dataset.classes),
        crop_padding=dataset.crop_padding, flip=dataset.flip, train_n=dataset.train_n,
        val_fraction=dataset.val_fraction,
    )  # fmt: skip
