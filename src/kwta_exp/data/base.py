"""What a dataset is.

Nothing here, nor in :mod:`.datasets` and :mod:`.published`, imports torch until images must be fetched,
so that a run which is finished, or which names a folder that does not exist, says so at once.
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
    """A dataset: uint8 images ``(N, C, H, W)``, in memory or read as needed, and labels ``(N,)`` from 0."""

    x_train: "UInt8 | FolderPixels"
    y_train: Int64
    x_test: "UInt8 | FolderPixels"
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
        train_n: train (and validate) on the first n training images of a fixed permutation alone;
            ``None`` takes all.
        val_fraction: share of the training images held out to choose the best epoch.
    """

    crop_padding: NonNegativeInt = 0
    flip: bool = False
    train_n: AtLeastTwo | None = None
    val_fraction: Share = 0.1

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex SHA-256 that changes with the content and with nothing else; fetches what is missing.

        Raises:
            UserError: if the data is neither there nor to be had, or is damaged.
        """

    @abstractmethod
    def load(self) -> Images:
        """Read the labels, and the images or the means to read them."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images, as far as it is known before they are read."""
        return 3, 32, 32

    @property
    def classes(self) -> int:
        """How many, as far as it is known before the labels are read."""
        return 10

    @property
    def downloadable(self) -> bool:
        """Whether what is not there comes from the network, and not from a place that the user names."""
        return False

    def present(self) -> bool:
        """Whether the data is where it is looked for."""
        return True


def channels_first(images: Any) -> UInt8:
    """uint8 ``(N, H, W)`` or ``(N, H, W, C)`` to contiguous ``(N, C, H, W)``."""
    x = np.asarray(images)
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x)
