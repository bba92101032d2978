"""Facts of the known data sets."""

import pytest

from data.catalog import DATASETS, facts
from data.errors import DataError


def test_known_sets() -> None:
    digits, cifar = facts("digits"), facts("cifar10")
    assert (digits.resolution, digits.channels, dict(digits.splits), digits.flip) == (
        8,
        1,
        {"train": 1500, "test": 297},
        False,
    )
    assert (cifar.resolution, cifar.channels, dict(cifar.splits), cifar.flip) == (
        32,
        3,
        {"train": 50_000, "test": 10_000},
        True,
    )
    assert [len(known.class_names) for known in DATASETS.values()] == [10, 10, 10, 1000, 1, 1]
    assert {name: (known.resolution, known.channels, known.flip) for name, known in DATASETS.items()} == {
        "digits": (8, 1, False),
        "cifar10": (32, 3, True),
        "fashion-mnist": (28, 1, False),
        "imagenet64": (64, 3, True),
        "ffhq64": (64, 3, True),
        "lsun-bedroom256": (256, 3, True),
    }


def test_a_misspelt_name_is_told_the_nearest() -> None:
    with pytest.raises(DataError, match=r"unknown data set 'cifar-10': did you mean 'cifar10'\?"):
        facts("cifar-10")


def test_a_strange_name_is_told_all() -> None:
    with pytest.raises(DataError, match="Known: cifar10, digits, fashion-mnist, ffhq64, imagenet64, lsun-bedroom256"):
        facts("xyzzy")
