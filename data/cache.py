"""The node-local cache: each node fetches, checks and decodes a shard once, and all its processes map the same files.

What it holds follows from its budget (`data.plan`): a whole split as pixels, or as the bytes of its shards, or a moving
window of shards. Layout: `{cache_dir}/{manifest sha256}/{split and form}/` (`data.extent`).
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.extent import Extent, Part
from data.folder import BUDGET_VARIABLE, CACHE_VARIABLE, cache_budget, default_cache_dir
from data.manifest import Manifest
from data.order import Shuffle, whole, window_of_shard
from data.plan import Plan, plan
from data.shelf import open_extent, try_extent

__all__ = [
    "BUDGET_VARIABLE",
    "CACHE_VARIABLE",
    "CachedSplit",
    "Split",
    "cached_split",
    "default_cache_dir",
    "open_split",
]

_BATCHES_A_WINDOW = 8
"""Workers of one node read a few batches apart; then they never need more windows at once than the cache can hold."""

Taken = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images of shape (b, C, H, W) and their labels of shape (b,), copied."""


class Split(Protocol):
    """What a loader reads from."""

    @property
    def shuffle(self) -> Shuffle:
        """The windows of its order."""
        ...

    @property
    def largest_batch(self) -> int | None:
        """The largest global batch that it can give, if there is a limit."""
        ...

    def take(self, seed: int, epoch: int, ids: NDArray[np.int64]) -> Taken:
        """Images and labels of these ids, asked for in the order of `epoch_order(seed, epoch, shuffle)`."""
        ...

    def wait(self) -> None:
        """Returns when as much of it as the cache can hold is there; raises what keeps it from coming."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedSplit:
    """A whole split on this node.

    Attributes:
        images: uint8 pixels of shape (n, C, H, W), mapped read-only. If only the encoded images fit into the cache, an
            object that decodes what is indexed along the first axis.
        labels: Classes, int64 of shape (n,).
        windows: Those of the order; None for a shuffle of the whole split.
        extent: Its files, held so that the cache keeps them.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    windows: Shuffle | None = None
    extent: Extent | None = None

    @property
    def shuffle(self) -> Shuffle:
        """The windows of the order."""
        return self.windows or whole(len(self.labels))

    @property
    def largest_batch(self) -> int | None:
        """There is no limit."""
        return None

    def take(self, seed: int, epoch: int, ids: NDArray[np.int64]) -> Taken:
        """Images and labels of these ids."""
        return self.images[ids], self.labels[ids]

    def wait(self) -> None:
        """Returns at once."""


class GrowingSplit:
    """A whole split that is read from while it is being fetched."""

    def __init__(self, extent: Extent, shuffle: Shuffle) -> None:
        """Takes an extent of every shard."""
        self.shuffle = shuffle
        self.largest_batch = None
        self._extent = extent
        self._preferred: tuple[int, int] | None = None
        self._whole = False

    def take(self, seed: int, epoch: int, ids: NDArray[np.int64]) -> Taken:
        """Images and labels of these ids, as soon as their shards are there."""
        extent = self._extent
        if not self._whole:
            if self._preferred != (seed, epoch):
                self._preferred = (seed, epoch)
                extent.prefer(np.argsort(window_of_shard(seed, epoch, self.shuffle), kind="stable").tolist())
            extent.wait(np.unique(np.searchsorted(extent.part.rows, ids, side="right") - 1))
            self._whole = extent.is_whole()
        return extent.images[ids], extent.labels[ids]

    def wait(self) -> None:
        """Returns when every shard is there."""
        self._extent.finish()


class MovingSplit:
    """A split that the cache cannot hold: one window of shards at a time, and the next one fetched meanwhile."""

    def __init__(self, part: Part, cache_dir: Path, budget: int, shuffle: Shuffle) -> None:
        """`part` is every shard of the split; nothing is fetched before something is taken."""
        self.shuffle = shuffle
        self.largest_batch = max(1, shuffle.smallest_window // _BATCHES_A_WINDOW)
        self._part, self._cache_dir, self._budget = part, cache_dir, budget
        self._open: dict[tuple[int, int, int], Extent] = {}
        self._lock = threading.Lock()

    def take(self, seed: int, epoch: int, ids: NDArray[np.int64]) -> Taken:
        """Images and labels of these ids; reads forward, each shard at most once in an epoch."""
        rows, manifest = self._part.rows, self._part.manifest
        shards = np.searchsorted(rows, ids, side="right") - 1
        windows = window_of_shard(seed, epoch, self.shuffle)
        images = np.empty((len(ids), manifest.channels, manifest.resolution, manifest.resolution), np.uint8)
        labels = np.empty(len(ids), np.int64)
        with self._lock:
            for window in np.unique(windows[shards]).tolist():
                extent = self._window(seed, epoch, window)
                chosen = windows[shards] == window
                places = np.searchsorted(extent.part.shards, shards[chosen])
                extent.wait(np.unique(places))
                within = extent.part.rows[places] + ids[chosen] - rows[shards[chosen]]
                images[chosen], labels[chosen] = extent.images[within], extent.labels[within]
        return images, labels

    def wait(self) -> None:
        """Returns at once, as the first window is only known when the first batch is."""

    def close(self) -> None:
        """Lets the cache remove what it holds; taking more opens it again."""
        with self._lock:
            self._keep()

    def _window(self, seed: int, epoch: int, window: int) -> Extent:
        here = (seed, epoch, window)
        following = (seed, epoch, window + 1) if window + 1 < self.shuffle.windows(epoch) else (seed, epoch + 1, 0)
        self._keep(here, following)
        if here not in self._open:
            self._open[here] = open_extent(self._part_of(here), self._cache_dir, self._budget)
        # Only now, so that both do not share the way from the storage while a batch waits for the first.
        if following not in self._open and self._open[here].is_whole():
            ahead = try_extent(self._part_of(following), self._cache_dir, self._budget)
            if ahead is not None:
                self._open[following] = ahead
        return self._open[here]

    def _keep(self, *keys: tuple[int, int, int]) -> None:
        for key in set(self._open).difference(keys):
            self._open.pop(key).close()

    def _part_of(self, key: tuple[int, int, int]) -> Part:
        seed, epoch, window = key
        chosen = np.flatnonzero(window_of_shard(seed, epoch, self.shuffle) == window).tolist()
        part = self._part
        return Part(url=part.url, manifest=part.manifest, split=part.split, shards=tuple(chosen), decoded=part.decoded)


def _planned(url: str, manifest: Manifest, split: str, budget: int) -> tuple[Plan, Part]:
    found = plan(manifest, split, budget)
    shards = tuple(range(len(manifest.split(split).shards)))
    return found, Part(url=manifest.place(url), manifest=manifest, split=split, shards=shards, decoded=found.decoded)


def open_split(url: str, manifest: Manifest, split: str, cache_dir: Path, budget: int | None = None) -> Split:
    """A split to train on, at once: what is not in the cache is fetched while batches are taken.

    Any number of processes may call this at once: one does the work. A damaged cache is mended.

    Args:
        url: Where the shards are.
        manifest: Their manifest.
        split: Name of the split.
        cache_dir: Folder on a disk of this node.
        budget: Bytes that the cache may take, the same on every node; BCM_CACHE_BUDGET or 64 GiB if it is None.
    """
    budget = cache_budget() if budget is None else budget
    found, part = _planned(url, manifest, split, budget)
    if found.resident:
        return GrowingSplit(open_extent(part, cache_dir, budget), found.shuffle)
    return MovingSplit(part, cache_dir, budget, found.shuffle)


def cached_split(url: str, manifest: Manifest, split: str, cache_dir: Path, budget: int | None = None) -> CachedSplit:
    """The whole split, from the cache or put there now; the arguments are those of `open_split`."""
    budget = cache_budget() if budget is None else budget
    found, part = _planned(url, manifest, split, budget)
    if not found.resident:
        raise DataError(
            f"the split {split!r} of {manifest.name!r} does not fit into a cache of {budget} bytes, and this needs all "
            f"of it: set {BUDGET_VARIABLE} higher"
        )
    extent = open_extent(part, cache_dir, budget)
    extent.finish()
    return CachedSplit(images=extent.images, labels=np.array(extent.labels), windows=found.shuffle, extent=extent)
