"""The base class of datasets.

Datasets import torch only when they read or download images, so a finished run or a missing folder is
reported at once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt, dataclasses

from kwta_exp.fields import STRICT, AtLeastTwo, Share

if TYPE_CHECKING:
    from kwta_exp.data.image_folder import FolderPixels

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """uint8 images ``(N, C, H, W)``, in memory or read as needed, and labels ``(N,)`` counted from 0."""

    x_train: "UInt8 | FolderPixels"
    y_train: Int64
    x_test: "UInt8 | FolderPixels"
    y_test: Int64

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
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
    """The options that every dataset has.

    Args:
        crop_padding: zeros added on each side of a training image before a random crop to its old size;
            0 for no crop. The k-WTA study used 4 on CIFAR-10.
        flip: mirror training images with probability 1/2.
        train_n: train and validate on the first n training images of a fixed permutation; ``None`` for all.
        val_fraction: share of the training images held out to choose the best epoch.
    """

    crop_padding: NonNegativeInt = 0
    flip: bool = False
    train_n: AtLeastTwo | None = None
    val_fraction: Share = 0.1

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex SHA-256 of the content; downloads missing files.

        Raises:
            UserError: if the data is missing and cannot be downloaded, or is damaged.
        """

    @abstractmethod
    def load(self) -> Images:
        """Read the labels and the images, or prepare to read the images as needed."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images; a guess where it is known only after reading them."""
        return 3, 32, 32

    @property
    def classes(self) -> int:
        """The number of classes; a guess where it is known only after reading the labels."""
        return 10

    @property
    def downloadable(self) -> bool:
        """Whether missing files can be downloaded."""
        return False

    def present(self) -> bool:
        """Whether the files exist."""
        return True


def channels_first(images: Any) -> UInt8:
    """Convert uint8 ``(N, H, W)`` or ``(N, H, W, C)`` to contiguous ``(N, C, H, W)``."""
    x = np.asarray(images)
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x)
