"""ImageNet-64 from npz batches: rows in the official order, labels from 1, nothing unpickled."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from made import cached_split

from data import store
from data.errors import DataError
from data.prepare import Choices, prepare
from data.prepare.imagenet64 import entries

CHOICES = Choices(samples_per_shard=4)


def batch(
    path: Path, count: int, other: Mapping[str, np.ndarray] | None = None, *, compressed: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {
        "data": rng.integers(0, 256, (count, 12288), dtype=np.uint8),
        "labels": rng.integers(1, 1001, count),
        "mean": np.zeros(12288),
        **(other or {}),
    }
    path.parent.mkdir(exist_ok=True)
    (np.savez_compressed if compressed else np.savez)(path, **arrays)  # type: ignore[operator]
    return arrays


def test_batches_become_splits_in_the_official_order(tmp_path: Path, bucket: str) -> None:
    source = tmp_path / "in"
    made = [batch(source / f"train_data_batch_{n}.npz", 5 + n % 3, seed=n, compressed=n == 2) for n in range(1, 11)]
    val = batch(source / "val_data.npz", 3, seed=99)
    told: list[str] = []
    manifest = prepare("imagenet64", str(source), str(tmp_path / "set"), choices=CHOICES, tell=told.append)
    assert told[:-1] == [
        "note: the source holds 60 train, 3 test images, but imagenet64 has 1,281,167 train, 50,000 test"
    ]
    assert len(manifest.class_names) == 1000
    counts = np.bincount(np.concatenate([arrays["labels"] for arrays in made]), minlength=1001)
    assert f"train        60 images, 1,000 classes: 1 {counts[1]}, 2 {counts[2]}, 3 {counts[3]}" in told[-1]
    for split, arrays in (("train", made), ("test", [val])):
        cached = cached_split(str(tmp_path / "set"), manifest, split, tmp_path / "cache")
        data = np.concatenate([array["data"] for array in arrays]).reshape(-1, 3, 64, 64)
        assert np.array_equal(np.asarray(cached.images), data)
        assert np.array_equal(cached.labels, np.concatenate([array["labels"] for array in arrays]) - 1)
    for path in source.iterdir():
        store.write_bytes(f"{bucket}/{path.name}", path.read_bytes())
    assert prepare("imagenet64", bucket, str(tmp_path / "again"), choices=CHOICES, tell=told.append) == manifest


def test_a_batch_can_be_read_from_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "train_data_batch_1.npz"
    data = batch(path, 300, compressed=True)["data"]
    found = list(entries(str(path), (path.name, 0), 270, 290))
    assert [sample.key[-6:] for sample in found] == [f"{number:06d}" for number in range(270, 290)]
    assert all(
        np.array_equal(s.image.transpose(2, 0, 1).ravel(), row) for s, row in zip(found, data[270:290], strict=True)
    )


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"data": np.zeros((4, 3072), np.uint8)}, r"not uint8 of shape \(n, 12288\)"),
        ({"data": np.zeros((4, 12288), np.float32)}, "data is float32"),
        ({"data": np.zeros((4, 12288), np.uint8, order="F")}, "data is uint8"),
        ({"labels": np.array([0, 1, 2, 3])}, "not whole numbers from 1 to 1000"),
        ({"labels": np.array([1, 2, 3, 1001])}, "not whole numbers from 1 to 1000"),
        ({"labels": np.array([1, 2, 3])}, "has 4 images, but 3 labels"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, other: dict[str, np.ndarray], message: str) -> None:
    batch(tmp_path / "in" / "train_data_batch_1.npz", 4, other)
    with pytest.raises(DataError, match=message):
        prepare("imagenet64", str(tmp_path / "in"), str(tmp_path / "set"), tell=lambda note: None)


@pytest.mark.parametrize("name", ["data", "labels"])
def test_nothing_is_unpickled(tmp_path: Path, name: str) -> None:
    bomb = np.array([Bomb(tmp_path / "exploded")] * 4, dtype=object)
    batch(tmp_path / "in" / "train_data_batch_1.npz", 4, {name: bomb})
    with pytest.raises(DataError, match="train_data_batch_1"):
        prepare("imagenet64", str(tmp_path / "in"), str(tmp_path / "set"), tell=lambda note: None)
    assert not (tmp_path / "exploded").exists()


def test_missing_and_damaged_batches(tmp_path: Path) -> None:
    batch(tmp_path / "in" / "train_data_batch_2.npz", 4)
    with pytest.raises(DataError, match=r"training batches \[2\]: some are missing"):
        prepare("imagenet64", str(tmp_path / "in"), str(tmp_path / "set"))
    path = tmp_path / "in" / "train_data_batch_1.npz"
    batch(path, 4)
    whole = path.read_bytes()
    path.write_bytes(whole[:20_000] + bytes([whole[20_000] ^ 1]) + whole[20_001:])
    with pytest.raises(DataError, match=r"cannot read .*train_data_batch_1\.npz \(BadZipFile"):
        prepare("imagenet64", str(tmp_path / "in"), str(tmp_path / "set"), tell=lambda note: None)
