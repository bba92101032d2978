"""The order of samples: pure functions of (seed, epoch, number of images), the same on any number of workers.

The images of all epochs form one endless stream. A training run's place in it is one integer: the images seen so far.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError

SEED_LIMIT = 2**63
"""Seeds and epochs lie in [0, SEED_LIMIT)."""

_EPOCHS_KEPT = 4
_ORDER_STREAM, _FLIP_STREAM = 0, 1


def _words(seed: int, epoch: int, stream: int, count: int) -> NDArray[np.uint64]:
    """`count` raw 64-bit words of Philox4x64-10, one independent stream for each (seed, epoch, stream)."""
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < SEED_LIMIT:
            raise DataError(f"{name} {value} is out of range: give a whole number from 0 to 2**63 - 1")
    if count < 1:
        raise DataError(f"cannot order {count} images: a split needs at least one")
    key = np.array([seed, 2 * epoch + stream], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


@lru_cache(maxsize=_EPOCHS_KEPT)
def permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Order of the image ids 0..count-1 in one epoch, as a read-only array.

    It sorts raw Philox words, because the result of `Generator.permutation` may change between numpy versions.
    """
    order = np.argsort(_words(seed, epoch, _ORDER_STREAM, count), kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


@lru_cache(maxsize=_EPOCHS_KEPT)
def flips(seed: int, epoch: int, count: int) -> NDArray[np.bool_]:
    """Whether each image id is mirrored in this epoch (a fair coin for each), as a read-only array."""
    coins = (_words(seed, epoch, _FLIP_STREAM, count) >> np.uint64(63)).astype(np.bool_)
    coins.setflags(write=False)
    return coins


def batch_ids(seed: int, images_seen: int, batch_size: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Epochs and ids, each of shape (batch_size,), of the global batch that starts at `images_seen`.

    Batches cross the ends of epochs without a gap; within an epoch every id comes exactly once.
    """
    if images_seen < 0:
        raise DataError(f"images_seen is {images_seen}: it counts images and cannot be negative")
    if batch_size < 1 or count < 1:
        raise DataError(f"cannot draw a batch of {batch_size} from {count} images: both must be at least 1")
    positions = images_seen + np.arange(batch_size, dtype=np.int64)
    epochs, places = np.divmod(positions, count)
    ids = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        ids[chosen] = permutation(seed, int(epoch), count)[places[chosen]]
    return epochs, ids


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
