"""The 1,797 handwritten digits that come with scikit-learn, in a split fixed for good."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from data.catalog import facts
from data.errors import DataError
from data.order import permutation
from data.prepare.pack import Sample

SPLIT_SEED = 20240401
"""Seed of the permutation whose first 1,500 images are the training split; changing it would make another data set."""

_BRIGHTEST = 16.0


def samples(split: str, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """The 8x8 images of "train" (1,500) or "test" (297) from `start` to `stop`; values 0..16 become 0..255, rounded."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    counts = facts("digits").splits
    if split not in counts:
        raise DataError(f"digits has no split {split!r}; it has {', '.join(counts)}")
    digits: Any = load_digits()
    images = np.rint(digits.data.reshape(-1, 8, 8) * (255.0 / _BRIGHTEST)).astype(np.uint8)
    order = permutation(SPLIT_SEED, 0, sum(counts.values()))
    chosen = order[: counts["train"]] if split == "train" else order[counts["train"] :]
    for place in chosen[start:stop]:
        yield Sample(key=f"{split}{place:05d}", image=images[place], label=int(digits.target[place]))


def labels() -> dict[str, tuple[int, ...]]:
    """Images of each digit, for each split."""
    return {
        split: tuple(np.bincount([sample.label for sample in samples(split)], minlength=10).tolist())
        for split in facts("digits").splits
    }
