"""Which image comes when, and which shards come next: pure functions of (seed, images seen, manifest, window).

They are the same on any number of workers, whatever a node's cache holds. The images of all epochs form one endless
stream. A training run's place in it is one integer: the images seen so far.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count as count_from

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.manifest import Manifest

SEED_LIMIT = 2**63
"""Seeds and epochs lie in [0, SEED_LIMIT)."""

SET_BYTES = 64 * 2**30
"""A set of at most so many bytes, each split in proportion, is shuffled as a whole; three windows of a larger one take
at most so many. A node's cache has that room by default. ImageNet-64 has 16 GB."""
FIRST_WINDOW_BYTES = 64 * 2**20
"""The same of one window in epoch 0, so that training begins when the first of a set's windows is there."""

_LABEL_BYTES, _SHARD_BYTES = 8, 33
"""What is counted beside the pixels. Fixed for good: the order that checkpoints go on with follows from it."""

_EPOCHS_KEPT = 4
_ORDER_STREAM, _FLIP_STREAM = 0, 1
_IMAGES, _SHARDS = 0, 1


@dataclass(frozen=True, kw_only=True)
class Shuffle:
    """How far images move: each epoch groups the shards into windows anew, and shuffles the images within each window.

    A single window is a shuffle of the whole split: `Shuffle(counts=(n,))` is one of n images.

    Attributes:
        counts: Number of images of each shard, in the order of the manifest.
        window: Largest number of shards in a window.
        first_window: The same in epoch 0, where it may be smaller: training begins when the first window is there.
        count: Number of images.
    """

    counts: tuple[int, ...]
    window: int = 1
    first_window: int = 1
    count: int = field(init=False)

    def __post_init__(self) -> None:
        """Checks ranges."""
        if not self.counts or min(self.counts) < 1:
            raise DataError(f"cannot shuffle shards of {self.counts} images: each needs at least one")
        if min(self.window, self.first_window) < 1:
            raise DataError(f"windows of {self.window} and {self.first_window} shards: give at least 1")
        object.__setattr__(self, "count", sum(self.counts))


def shuffle_of(manifest: Manifest, split: str, window: int = 0) -> Shuffle:
    """How a split is shuffled.

    Args:
        manifest: Of the set.
        split: Name of the split.
        window: Shards in a window; 0 for all of them, or in a set of more than `SET_BYTES`, for a power of two of them.
    """
    shards = manifest.split(split).shards
    if window < 0 or window > len(shards):
        raise DataError(f"window is {window}: give a number of shards up to the {len(shards)} of {split!r}, or 0")
    counts = tuple(shard.count for shard in shards)
    image_bytes = manifest.channels * manifest.resolution**2 + _LABEL_BYTES
    split_bytes = sum(counts) * image_bytes + len(shards) * _SHARD_BYTES
    share = SET_BYTES * sum(counts) // sum(part.count for part in manifest.splits.values())
    if not window and split_bytes <= share:
        window = len(shards)
    elif not window:
        window = 2 ** (max(1, share // 3 // (max(counts) * image_bytes + _SHARD_BYTES)).bit_length() - 1)
    first = max(1, FIRST_WINDOW_BYTES * len(shards) // split_bytes)
    return Shuffle(counts=counts, window=window, first_window=min(first, window))


def _words(seed: int, epoch: int, stream: int, count: int, kind: int = _IMAGES) -> NDArray[np.uint64]:
    """`count` raw 64-bit words of Philox4x64-10, one independent stream for each (seed, epoch, stream, kind)."""
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < SEED_LIMIT:
            raise DataError(f"{name} {value} is out of range: give a whole number from 0 to 2**63 - 1")
    if count < 1:
        raise DataError(f"cannot order {count} images: a split needs at least one")
    key = np.array([seed, 2 * epoch + stream], dtype=np.uint64)
    # The counter's highest word tells the kinds apart; no stream is long enough to run into the next one.
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, kind], dtype=np.uint64)).random_raw(count)


@lru_cache(maxsize=_EPOCHS_KEPT)
def permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Order of the image ids 0..count-1 in one epoch, as a read-only array.

    It sorts raw Philox words, because the result of `Generator.permutation` may change between numpy versions.
    """
    order = np.argsort(_words(seed, epoch, _ORDER_STREAM, count), kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


@lru_cache(maxsize=_EPOCHS_KEPT)
def window_of_shard(seed: int, epoch: int, shuffle: Shuffle) -> NDArray[np.int64]:
    """The window that each shard belongs to in one epoch, as a read-only array; windows differ by at most one shard."""
    shards = len(shuffle.counts)
    windows = -(-shards // (shuffle.window if epoch else shuffle.first_window))
    place = np.empty(shards, dtype=np.int64)
    place[np.argsort(_words(seed, epoch, _ORDER_STREAM, shards, _SHARDS), kind="stable")] = np.arange(shards)
    window = place * windows // shards
    window.setflags(write=False)
    return window


@lru_cache(maxsize=_EPOCHS_KEPT)
def epoch_order(seed: int, epoch: int, shuffle: Shuffle) -> NDArray[np.int64]:
    """Order of the image ids in one epoch, window after window, as a read-only array.

    One window gives `permutation`; within each of several windows, the images keep the order they have there.
    """
    order, window = permutation(seed, epoch, shuffle.count), window_of_shard(seed, epoch, shuffle)
    if window.any():
        order = order[np.argsort(np.repeat(window, shuffle.counts)[order], kind="stable")]
        order.setflags(write=False)
    return order


@lru_cache(maxsize=_EPOCHS_KEPT)
def flips(seed: int, epoch: int, count: int) -> NDArray[np.bool_]:
    """Whether each image id is mirrored in this epoch (a fair coin for each), as a read-only array."""
    coins = (_words(seed, epoch, _FLIP_STREAM, count) >> np.uint64(63)).astype(np.bool_)
    coins.setflags(write=False)
    return coins


def batch_ids(
    seed: int, images_seen: int, batch_size: int, shuffle: Shuffle
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Epochs and ids, each of shape (batch_size,), of the global batch that starts at `images_seen`.

    Batches cross the ends of windows and epochs without a gap; within an epoch every id comes exactly once.

    Args:
        seed: Seed of the order.
        images_seen: Images of the endless stream before this batch.
        batch_size: Size of the global batch, over all workers.
        shuffle: How the split is shuffled.
    """
    if images_seen < 0:
        raise DataError(f"images_seen is {images_seen}: it counts images and cannot be negative")
    if batch_size < 1:
        raise DataError(f"cannot draw a batch of {batch_size} images: give at least 1")
    positions = images_seen + np.arange(batch_size, dtype=np.int64)
    epochs, places = np.divmod(positions, shuffle.count)
    ids = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        ids[chosen] = epoch_order(seed, int(epoch), shuffle)[places[chosen]]
    return epochs, ids


def windows_from(seed: int, images_seen: int, shuffle: Shuffle) -> Iterator[NDArray[np.int64]]:
    """The shards of each window, from the one that a place of the endless stream lies in, without end."""
    first_epoch, place = divmod(images_seen, shuffle.count)
    for epoch in count_from(first_epoch):
        window = window_of_shard(seed, epoch, shuffle)
        sizes = np.bincount(window, weights=shuffle.counts)
        first = int(np.searchsorted(sizes.cumsum(), place, side="right")) if epoch == first_epoch else 0
        for number in range(first, len(sizes)):
            yield np.flatnonzero(window == number)


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that belongs to `rank`: contiguous, equal on every rank."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise DataError(f"rank {rank} of {world_size} workers does not exist: ranks go from 0 to workers - 1")
    if batch_size % world_size:
        lower = batch_size - batch_size % world_size
        options = " or ".join(str(size) for size in (lower, lower + world_size) if size > 0)
        raise DataError(
            f"a global batch of {batch_size} images cannot be shared equally by {world_size} workers: "
            f"use a batch size of {options}, or a number of workers that divides {batch_size}"
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)
