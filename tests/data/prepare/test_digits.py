"""The digits: all of scikit-learn's, in a fixed split."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from data.errors import DataError
from data.prepare import digits


def test_the_splits_part_all_images() -> None:
    values, targets = load_digits(return_X_y=True)
    found = {split: list(digits.samples(split)) for split in ("train", "test")}
    assert {split: len(samples) for split, samples in found.items()} == {"train": 1500, "test": 297}
    places = [int(sample.key[-5:]) for samples in found.values() for sample in samples]
    assert sorted(places) == list(range(1797))
    for place, sample in zip(places, found["train"] + found["test"], strict=True):
        assert sample.label == targets[place]
        assert np.array_equal(sample.image, np.round(values[place].reshape(8, 8) * 255 / 16).astype(np.uint8))


def test_the_split_is_fixed_for_good() -> None:
    keys = ",".join(sample.key for sample in digits.samples("test"))
    assert (
        hashlib.sha256(keys.encode()).hexdigest() == "55c8e0d06a8e046cc6c593c4e2cd9ab7b3caa1c41e8a29ff4308881f06bb8cd0"
    )


def test_every_class_is_in_both_splits() -> None:
    for split, least in (("train", 120), ("test", 20)):
        counts = np.bincount([sample.label for sample in digits.samples(split)], minlength=10)
        assert counts.min() >= least


def test_an_unknown_split() -> None:
    with pytest.raises(DataError, match="no split 'valid'; it has train, test"):
        next(digits.samples("valid"))
