"""Datasets: content, fingerprints, refusals; batches: order, augmentation, splits."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from kwta_exp.data.batches import Split, TrainingBatches, crop_and_flip, first_test_images, split_training
from kwta_exp.data.datasets import CIFAR10, Arrays, Digits, FashionMNIST
from kwta_exp.errors import UserError
from kwta_exp.randomness import fold, key

CPU = torch.device("cpu")


def test_digits_equal_those_of_scikit_learn() -> None:
    images = Digits().load()
    assert images.x_train.shape == (1437, 1, 8, 8)
    assert images.x_test.shape == (360, 1, 8, 8)
    assert (images.num_classes, images.in_channels, images.image_size) == (10, 1, (8, 8))
    assert images.x_train.max() == 255
    assert np.bincount(images.y_test).min() > 20
    theirs = load_digits()
    assert (
        np.bincount(theirs.target).tolist()
        == np.bincount(np.concatenate([images.y_train, images.y_test])).tolist()
    )
    mean = np.concatenate([images.x_train, images.x_test]).mean() / 255
    assert abs(mean - theirs.images.mean() / 16) < 1e-3


def test_arrays_become_channels_first(arrays_file: Path) -> None:
    images = Arrays(path=str(arrays_file)).load()
    with np.load(arrays_file) as raw:
        assert images.x_train.shape == (60, 3, 9, 7)
        assert images.x_train[5, 2, 4, 3] == raw["x_train"][5, 4, 3, 2]
    assert (images.num_classes, images.in_channels, images.image_size) == (3, 3, (9, 7))


def test_fingerprint_depends_on_content_not_on_location(arrays_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.npz"
    copy.write_bytes(arrays_file.read_bytes())
    assert Arrays(path=str(copy)).fingerprint() == Arrays(path=str(arrays_file)).fingerprint()
    copy.write_bytes(arrays_file.read_bytes() + b" ")
    assert Arrays(path=str(copy)).fingerprint() != Arrays(path=str(arrays_file)).fingerprint()


def _write(path: Path, **changes: object) -> Arrays:
    arrays = {
        "x_train": np.zeros((4, 2, 2), np.uint8), "y_train": np.array([0, 1, 0, 1]),
        "x_test": np.zeros((2, 2, 2), np.uint8), "y_test": np.array([0, 1]),
    } | changes  # fmt: skip
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})  # type: ignore[arg-type]
    return Arrays(path=str(path))


@pytest.mark.parametrize(("change", "complaint"), [
    ({"y_test": None}, "has no y_test"),
    ({"x_train": np.zeros((4, 2, 2), np.float32)}, r"x_train is float32 .*expected uint8"),
    ({"x_train": np.zeros((4, 4), np.uint8)}, r"x_train is uint8 \(4, 4\)"),
    ({"y_train": np.array([0, 1])}, r"y_train is int64 \(2,\)"),
    ({"y_train": np.array([0.0, 1, 0, 1])}, "y_train is float64"),
    ({"y_train": np.array([0, -1, 0, 1])}, "y_train holds -1"),
    ({"x_train": np.zeros((1, 2, 2), np.uint8), "y_train": np.array([0])}, "expected 2 or more"),
    ({"x_test": np.zeros((2, 3, 3), np.uint8)}, "expected the same"),
    ({"y_train": np.array([print, 1, 0, 1], dtype=object)}, "not a readable .npz"),
])  # fmt: skip
def test_wrong_arrays_are_refused(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        _write(tmp_path / "a.npz", **change).load()


def test_truncated_and_missing_files_are_refused(arrays_file: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.npz"
    torn.write_bytes(arrays_file.read_bytes()[:-500])
    with pytest.raises(UserError, match="not a readable"):
        Arrays(path=str(torn)).load()
    with pytest.raises(UserError, match="no such file"):
        Arrays(path="nowhere.npz").fingerprint()
    with pytest.raises(UserError, match=r"dataset\.root=nowhere \(paths\.data\): no such folder"):
        CIFAR10(root="nowhere").fingerprint()
    with pytest.raises(UserError, match="download=false"):
        CIFAR10(root=str(tmp_path), download=False).fingerprint()


def test_damaged_fashion_mnist_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FashionMNIST._FILES:
        (raw / name).write_bytes(b"\0" * 16)
    with pytest.raises(UserError, match="is damaged"):
        FashionMNIST(root=str(tmp_path)).fingerprint()


def test_validation_images_are_held_out() -> None:
    images = Digits().load()
    train, val = split_training(images, None, 0.1, 0, CPU)
    assert len(val) == 144
    assert sorted(train.index.tolist() + val.index.tolist()) == list(range(1437))
    again, _ = split_training(images, None, 0.1, 0, CPU)
    other, _ = split_training(images, None, 0.1, 1, CPU)
    assert torch.equal(train.index, again.index)
    assert not torch.equal(train.index, other.index)


def test_first_n_images_of_a_sorted_file_include_every_class(arrays_file: Path) -> None:
    images = Arrays(path=str(arrays_file)).load()
    chosen = first_test_images(images, 12, CPU)
    assert set(chosen.y.tolist()) == {0, 1, 2}
    assert torch.equal(chosen.y, torch.from_numpy(images.y_test)[chosen.index])
    # A larger n keeps the smaller one's images, and more than there are means all.
    assert torch.equal(first_test_images(images, 20, CPU).index[:12], chosen.index)
    assert len(first_test_images(images, 999, CPU)) == len(first_test_images(images, None, CPU)) == 30


def _split(n: int) -> Split:
    x = torch.arange(n * 16).remainder(251).to(torch.uint8).view(n, 1, 4, 4)
    return Split(x, torch.arange(n), torch.arange(n))


def test_an_epoch_visits_each_image_once_in_a_new_order() -> None:
    batches = TrainingBatches(_split(10), 4, 0, False, seed=0)
    assert len(batches) == 3
    seen = [torch.cat([b.y for b in batches.epoch(e)]).tolist() for e in (0, 1)]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(10))
    assert seen[0] != seen[1]
    for batch in batches.epoch(0):
        assert torch.equal(batch.x, _split(10).x[batch.y].float() / 255)


@pytest.mark.parametrize(("n", "sizes"), [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (3, [3]), (1, [1])])
def test_a_single_image_left_over_joins_the_batch_before(n: int, sizes: list[int]) -> None:
    batches = TrainingBatches(_split(n), 4, 0, False, seed=0)
    assert [len(b.y) for b in batches.epoch(0)] == sizes
    assert len(batches) == len(sizes)


def test_an_epoch_can_start_at_any_batch() -> None:
    batches = TrainingBatches(_split(10), 4, 1, True, seed=0)
    whole, rest = list(batches.epoch(2)), list(batches.epoch(2, start=1))
    for a, b in zip(whole[1:], rest, strict=True):
        assert all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))


def test_crop_and_flip_only_shifts_and_mirrors() -> None:
    x = torch.randint(1, 256, (64, 2, 5, 5), dtype=torch.uint8)
    out = crop_and_flip(x, fold(key(0, "a"), torch.arange(64)), 2, True)
    assert out.shape == x.shape
    seen = set()
    for before, after in zip(x, out, strict=True):
        padded = torch.nn.functional.pad(before, (2,) * 4)
        matches = []
        for top, left in itertools.product(range(5), range(5)):
            crop = padded[:, top : top + 5, left : left + 5]
            matches += [
                (top, left, flip)
                for flip in (False, True)
                if torch.equal(crop.flip(2) if flip else crop, after)
            ]
        assert matches
        seen.add(matches[0])
    assert len(seen) > 20
    assert torch.equal(crop_and_flip(x, torch.arange(64), 0, False), x)


@pytest.mark.parametrize(("y_train", "y_test", "said"), [
    ([0, 1, 2, 0, 1, 2], [0, 1], None),
    ([0, 1, 4, 0, 1, 4], [0, 4], "2 of 5 classes have no training image (2, 3)."),
    ([0, 1, 0, 1, 0, 1], [0, 7], "6 of 8 classes have no training image (2, 3, 4, 5, 6, ...)."),
    ([0, 255, 0, 255, 0, 255], [0, 255], "254 of 256 classes have no training image (1, 2, 3, 4, 5, ...)."),
])  # fmt: skip
def test_classes_without_training_images_cause_a_warning(
    y_train: list[int], y_test: list[int], said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "images.npz"
    np.savez(
        path, x_train=np.zeros((6, 4, 4), np.uint8), y_train=y_train,
        x_test=np.zeros((2, 4, 4), np.uint8), y_test=y_test,
    )  # fmt: skip
    Arrays(path=str(path)).load()
    assert (said in caplog.text) if said else caplog.text == ""


@pytest.mark.parametrize(
    "shape", [(2, 28, 28), (2, 28, 28, 1), (2, 3, 32, 3), (2, 32, 32, 12), (2, 1, 1, 1), (2, 5, 7, 5)]
)
def test_plausible_layouts_are_accepted(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    x, y = np.zeros(shape, np.uint8), np.arange(2)
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    assert len(Arrays(path=str(path)).load().x_train) == 2


def test_huge_labels_are_handled_fast(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "images.npz"
    x, y = np.zeros((2, 4, 4), np.uint8), np.array([0, 2**62])
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    assert Arrays(path=str(path)).load().num_classes == 2**62 + 1
    assert "(1, 2, 3, 4, 5, ...)" in caplog.text
