"""Resumable batches: a pure function of (seed, images seen) and the windows, gathered ahead by one thread."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.cache import BUDGET_VARIABLE, Split
from data.errors import DataError
from data.order import batch_ids, flips, rank_slice

_BATCHES_AHEAD = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        ids: Ids of the images in the split, int64 of shape (b,).
        images: uint8 pixels of shape (b, C, H, W), mirrored where the order says so.
        labels: Classes, int64 of shape (b,).
        positions: Place of each image in the endless stream of epochs, int64 of shape (b,).
        wait: Seconds the consumer waited for this batch.
    """

    ids: Tensor
    images: Tensor
    labels: Tensor
    positions: Tensor
    wait: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Loader:
    """Batches of a cached split; its whole state is the integer `images_seen`.

    Attributes:
        cached: The images: of `cached_split`, or of `open_split`, which gives batches while it is being fetched.
        batch_size: Size of the global batch, over all ranks.
        seed: Seed of the order and of the flips.
        rank: This worker's number, from 0.
        world_size: Number of workers; it must divide the batch size.
        flip: Whether to mirror each image with probability 1/2 in each epoch.
        pinned: Whether batches lie in page-locked memory, from where a GPU copies them while it computes.
    """

    cached: Split
    batch_size: int
    seed: int
    rank: int
    world_size: int
    flip: bool
    pinned: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        """Fails before the first batch, not in the middle of a run."""
        if self.batch_size < 1:
            raise DataError(f"batch size is {self.batch_size}: give at least 1")
        rank_slice(self.batch_size, self.rank, self.world_size)
        largest = self.cached.largest_batch
        if largest is not None and self.batch_size > largest:
            raise DataError(
                f"batch size is {self.batch_size}, but the windows of shards that the cache can hold allow batches of "
                f"at most {largest}: set {BUDGET_VARIABLE} higher, or take smaller batches"
            )

    def batch(self, images_seen: int) -> Batch:
        """This rank's part of the global batch that starts at `images_seen`, whatever was asked for before."""
        shuffle = self.cached.shuffle
        part = rank_slice(self.batch_size, self.rank, self.world_size)
        epochs, ids = (values[part] for values in batch_ids(self.seed, images_seen, self.batch_size, shuffle))
        parts = [self._of_epoch(int(epoch), ids[epochs == epoch]) for epoch in np.unique(epochs)]
        images, labels = (
            np.concatenate(arrays) if len(parts) > 1 else arrays[0] for arrays in zip(*parts, strict=True)
        )
        batch = Batch(
            ids=torch.from_numpy(ids.copy()),
            images=torch.from_numpy(images),
            labels=torch.from_numpy(labels),
            positions=torch.arange(images_seen + part.start, images_seen + part.stop),
            wait=0.0,
        )
        return (
            replace(batch, images=batch.images.pin_memory(), labels=batch.labels.pin_memory()) if self.pinned else batch
        )

    def _of_epoch(self, epoch: int, ids: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        images, labels = self.cached.take(self.seed, epoch, ids)
        if self.flip:
            mirrored = np.flatnonzero(flips(self.seed, epoch, self.cached.shuffle.count)[ids])
            images[mirrored] = images[mirrored, :, :, ::-1]
        return images, labels

    def batches(self, images_seen: int) -> Generator[Batch, None, None]:
        """Endless batches from `images_seen` on. Closing the iterator ends its thread, whose errors are raised here."""
        positions = count(images_seen, self.batch_size)
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bcm-loader")
        try:
            pending = deque(pool.submit(self.batch, next(positions)) for _ in range(_BATCHES_AHEAD))
            while True:
                began = perf_counter()
                batch = pending.popleft().result()
                wait = perf_counter() - began
                pending.append(pool.submit(self.batch, next(positions)))
                yield replace(batch, wait=wait)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
