"""Resumable batches: a pure function of (seed, images seen), gathered ahead of the consumer by one thread."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from data.cache import CachedSplit
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
        cached: The images.
        batch_size: Size of the global batch, over all ranks.
        seed: Seed of the order and of the flips.
        rank: This worker's number, from 0.
        world_size: Number of workers; it must divide the batch size.
        flip: Whether to mirror each image with probability 1/2 in each epoch.
    """

    cached: CachedSplit
    batch_size: int
    seed: int
    rank: int
    world_size: int
    flip: bool

    def __post_init__(self) -> None:
        """Fails before the first batch, not in the middle of a run."""
        if self.batch_size < 1:
            raise DataError(f"batch size is {self.batch_size}: give at least 1")
        rank_slice(self.batch_size, self.rank, self.world_size)

    def batch(self, images_seen: int) -> Batch:
        """This rank's part of the global batch that starts at `images_seen`, whatever was asked for before."""
        total = len(self.cached.labels)
        part = rank_slice(self.batch_size, self.rank, self.world_size)
        epochs, ids = (values[part] for values in batch_ids(self.seed, images_seen, self.batch_size, total))
        images = self.cached.images[ids]
        if self.flip:
            for epoch in np.unique(epochs):
                mirrored = (epochs == epoch) & flips(self.seed, int(epoch), total)[ids]
                images[mirrored] = images[mirrored, :, :, ::-1]
        return Batch(
            ids=torch.from_numpy(ids.copy()),
            images=torch.from_numpy(images),
            labels=torch.from_numpy(self.cached.labels[ids]),
            positions=torch.arange(images_seen + part.start, images_seen + part.stop),
            wait=0.0,
        )

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
