"""Resumable batches: a pure function of (seed, images seen) and the shuffle, gathered ahead by one thread."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.cache import BUDGET_VARIABLE, ShardCache
from data.errors import DataError
from data.order import Shuffle, batch_ids, flips, rank_slice, windows_from

_BATCHES_AHEAD = 3
_FETCHERS = 2
_LOOKS_AN_EPOCH = 64
_SHARE_AHEAD = 2 / 3
"""Of a cache that does not hold the whole split, for the window that is read and those that come next: a slower worker
may still read the one before."""


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
    """Batches of a split; its whole state is the integer `images_seen`.

    Attributes:
        cache: The images, as this node holds them.
        shuffle: Their order, of `shuffle_of`.
        batch_size: Size of the global batch, over all ranks.
        seed: Seed of the order and of the flips.
        rank: This worker's number, from 0.
        world_size: Number of workers; it must divide the batch size.
        flip: Whether to mirror each image with probability 1/2 in each epoch.
        pinned: Whether batches lie in page-locked memory, from where a GPU copies them while it computes.
    """

    cache: ShardCache
    shuffle: Shuffle
    batch_size: int
    seed: int
    rank: int
    world_size: int
    flip: bool
    pinned: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        """Fails before the first batch, not in the middle of a run; warns of a cache that is too small to be quick."""
        if self.batch_size < 1:
            raise DataError(f"batch size is {self.batch_size}: give at least 1")
        rank_slice(self.batch_size, self.rank, self.world_size)
        window = int(np.sort(self.cache.sizes)[-self.shuffle.window :].sum())
        if window > self.cache.budget:
            print(
                f"warning: images are shuffled among {self.shuffle.window} shards, which take {window} bytes, but the "
                f"cache of this node holds {self.cache.budget}: shards will be fetched again and again. Set "
                f"{BUDGET_VARIABLE} higher, or start the run with a smaller --window."
            )

    def batch(self, images_seen: int) -> Batch:
        """This rank's part of the global batch that starts at `images_seen`, whatever was asked for before."""
        part = rank_slice(self.batch_size, self.rank, self.world_size)
        epochs, ids = (values[part] for values in batch_ids(self.seed, images_seen, self.batch_size, self.shuffle))
        images, labels = self.cache.take(ids)
        if self.flip:
            for epoch in np.unique(epochs).tolist():
                mirrored = np.flatnonzero((epochs == epoch) & flips(self.seed, epoch, self.shuffle.count)[ids])
                images[mirrored] = images[mirrored, :, :, ::-1]
        batch = Batch(
            ids=torch.from_numpy(ids.copy()),
            images=torch.from_numpy(images),
            labels=torch.from_numpy(labels),
            positions=torch.arange(images_seen + part.start, images_seen + part.stop),
            wait=0.0,
        )
        if not self.pinned:
            return batch
        return replace(batch, images=batch.images.pin_memory(), labels=batch.labels.pin_memory())

    def batches(self, images_seen: int) -> Generator[Batch, None, None]:
        """Endless batches from `images_seen` on. Closing ends the threads, whose errors are raised here."""
        positions = count(images_seen, self.batch_size)
        fetchers = ThreadPoolExecutor(max_workers=_FETCHERS, thread_name_prefix="bcm-loader-fetch")
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bcm-loader")
        asked: dict[int, Future[Any]] = {}
        last_look = -1

        def ended(fetch: Future[Any]) -> None:
            if not fetch.cancelled() and fetch.exception():  # or each of the others would fail as slowly
                for other in list(asked.values()):
                    other.cancel()

        def gathered(position: int) -> Batch:
            nonlocal last_look
            if (look := position * _LOOKS_AN_EPOCH // self.shuffle.count) > last_look:
                last_look, ahead = look, self._shards_ahead(position)
                for shard in asked.keys() - set(ahead):
                    del asked[shard]
                for shard in ahead:
                    if shard not in asked:
                        asked[shard] = fetchers.submit(self.cache.content, shard)
                        asked[shard].add_done_callback(ended)  # an error is met again when a batch needs the shard
            return self.batch(position)

        try:
            pending = deque(pool.submit(gathered, next(positions)) for _ in range(_BATCHES_AHEAD))
            while True:
                began = perf_counter()
                batch = pending.popleft().result()
                wait = perf_counter() - began
                pending.append(pool.submit(gathered, next(positions)))
                yield replace(batch, wait=wait)
        finally:
            fetchers.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=True, cancel_futures=True)
            fetchers.shutdown(wait=True)

    def _shards_ahead(self, images_seen: int) -> list[int]:
        """The shards of the window that is read and of those that come next, as far as the cache can hold them."""
        ahead: dict[int, None] = {}
        room = self.cache.budget * (1 if self.cache.sizes.sum() <= self.cache.budget else _SHARE_AHEAD)
        for window in windows_from(self.seed, images_seen, self.shuffle):
            fresh = [shard for shard in window.tolist() if shard not in ahead]
            room -= self.cache.sizes[fresh].sum()
            if not fresh or room < 0:
                break
            ahead |= dict.fromkeys(fresh)
        return list(ahead)
