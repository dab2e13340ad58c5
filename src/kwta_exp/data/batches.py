"""Batches from images that live on the device and are augmented there, each with its own random key."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kwta_exp.data.base import Images, Int64, UInt8
from kwta_exp.data.image_folder import FolderPixels
from kwta_exp.randomness import fold, key, permutation, uniform


@dataclass(frozen=True)
class Batch:
    """Images float32 ``(N, C, H, W)`` in [0, 1], labels ``(N,)``, and a random key for each image."""

    x: Tensor
    y: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Split:
    """A part of a dataset, on one device: uint8 images ``(N, C, H, W)``, labels ``(N,)``, and the index of each
    image in the training or test set, int64 ``(N,)``. Images of a folder are read as needed.
    """

    x: Tensor | FolderPixels
    y: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, batch_size: int, key_of_pass: int) -> Iterator[Batch]:
        """All images, in order."""
        chunks = torch.arange(len(self), device=self.y.device).split(batch_size)
        for chunk, x in zip(chunks, _stream(self.x, chunks, None), strict=True):
            yield Batch(to_float(x), self.y[chunk], fold(key_of_pass, self.index[chunk]))


@dataclass(frozen=True)
class TrainingBatches:
    """Shuffled, augmented batches that are a pure function of (seed, epoch).

    The last batch may be smaller, but a single remaining image joins the batch before it: BatchNorm
    needs two.
    """

    split: Split
    batch_size: int
    crop_padding: int
    flip: bool
    seed: int

    def __len__(self) -> int:
        whole, rest = divmod(len(self.split), self.batch_size)
        return max(1, whole + (rest > 1))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from number ``start`` on."""
        order = permutation(len(self.split), key(self.seed, "order", epoch)).to(self.split.y.device)
        ends = [(number + 1) * self.batch_size for number in range(len(self) - 1)] + [len(order)]
        chunks = order.tensor_split(ends[:-1])[start:]
        augment = [fold(key(self.seed, "augment", epoch), self.split.index[chunk]) for chunk in chunks]
        in_memory = isinstance(self.split.x, Tensor)
        for chunk, keys, x in zip(chunks, augment, _stream(self.split.x, chunks, augment), strict=True):
            if in_memory:
                x = crop_and_flip(x, keys, self.crop_padding, self.flip)
            noise = fold(key(self.seed, "train", epoch), self.split.index[chunk])
            yield Batch(to_float(x), self.split.y[chunk], noise)


def _stream(
    x: Tensor | FolderPixels, chunks: Sequence[Tensor], keys: Sequence[Tensor] | None
) -> Iterator[Tensor]:
    """The uint8 images of each chunk; images read from files are augmented by ``keys`` already."""
    if isinstance(x, Tensor):
        return (x[chunk] for chunk in chunks)
    return x.stream(chunks, keys)


def split_training(
    images: Images, train_n: int | None, val_fraction: float, seed: int, device: torch.device
) -> tuple[Split, Split]:
    """Split the training images at random: for training, and for choosing the best epoch.

    Args:
        images: the dataset; its test images are not used.
        train_n: split only the first n images of a permutation that does not depend on the seed.
        val_fraction: share of the second part; each part holds at least one image.
        seed: of the split.
        device: holds the parts.
    """
    available = permutation(len(images.x_train), key(0, "training order"))[:train_n].sort().values
    order = available[permutation(len(available), key(seed, "validation"))]
    held_out = min(max(1, round(val_fraction * len(order))), len(order) - 1)
    val, train = (
        _part(images.x_train, images.y_train, part, device)
        for part in (order[:held_out].sort().values, order[held_out:].sort().values)
    )
    return train, val


def first_test_images(images: Images, n: int | None, device: torch.device) -> Split:
    """The first ``n`` test images of a fixed permutation; all of them for ``None`` or a larger n.

    The permutation depends only on the number of test images, so all runs use the same images, and a
    file sorted by class still yields every class.
    """
    chosen = permutation(len(images.x_test), key(0, "test order"))[:n]
    return _part(images.x_test, images.y_test, chosen, device)


def _part(x: UInt8 | FolderPixels, y: Int64, index: Tensor, device: torch.device) -> Split:
    labels = torch.from_numpy(y)[index].to(device)
    if isinstance(x, FolderPixels):
        return Split(x.subset(index, device), labels, index.to(device))
    return Split(torch.from_numpy(x)[index].to(device), labels, index.to(device))


def to_float(x: Tensor) -> Tensor:
    """Convert uint8 0..255, or floating point in [0, 1], to float32 in [0, 1]."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def crop_and_flip(x_NCHW: Tensor, keys_N: Tensor, padding: int, flip: bool) -> Tensor:
    """Zero-pad, crop at a random place, and mirror with probability 1/2; any dtype."""
    n, _, height, width = x_NCHW.shape
    draw_N3 = uniform(keys_N, (3,))
    if padding:
        top_N, left_N = (draw_N3[:, :2] * (2 * padding + 1)).long().unbind(1)
        rows_NH = top_N[:, None] + torch.arange(height, device=x_NCHW.device)
        columns_NW = left_N[:, None] + torch.arange(width, device=x_NCHW.device)
        padded_NHWC = F.pad(x_NCHW, (padding,) * 4).permute(0, 2, 3, 1)
        image_N = torch.arange(n, device=x_NCHW.device)[:, None, None]
        cropped_NHWC = padded_NHWC[image_N, rows_NH[:, :, None], columns_NW[:, None, :]]
        x_NCHW = cropped_NHWC.permute(0, 3, 1, 2).contiguous()
    if flip:
        mirrored_N = draw_N3[:, 2] < 0.5
        x_NCHW = torch.where(mirrored_N[:, None, None, None], x_NCHW.flip(3), x_NCHW)
    return x_NCHW
