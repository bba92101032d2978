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
    assert [len(known.class_names) for known in DATASETS.values()] == [10, 10]


def test_a_misspelt_name_is_told_the_nearest() -> None:
    with pytest.raises(DataError, match=r"unknown data set 'cifar-10': did you mean 'cifar10'\?"):
        facts("cifar-10")


def test_a_strange_name_is_told_all() -> None:
    with pytest.raises(DataError, match="Known: cifar10, digits"):
        facts("xyzzy")
