"""Small sets that tests make, and whole splits as arrays."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data import store
from data.cache import ShardCache
from data.manifest import Manifest, Shard, SplitManifest, shard_name
from data.prepare.pack import Sample, pack, shard_of


@dataclass(frozen=True)
class Whole:
    """All images (n, C, H, W) and labels (n,) of a split, copied from the cache."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def cached_split(url: str, manifest: Manifest, split: str, cache_dir: Path, budget: int | None = None) -> Whole:
    cache = ShardCache(url, manifest, split, cache_dir, budget)
    return Whole(*cache.take(np.arange(len(cache))))


def write_split(
    url: str, split: str, samples: Iterable[Sample], *, samples_per_shard: int = 1000, encoding: str = "raw"
) -> SplitManifest:
    """Writes the shards of one split under `url`; writes no manifest."""
    shards: list[Shard] = []
    stream = iter(samples)
    while batch := list(islice(stream, samples_per_shard)):
        payload, offsets, sizes = pack(batch, encoding)
        shards.append(shard_of(shard_name(split, len(shards)), payload, offsets, sizes))
        store.write_bytes(store.join(url, shards[-1].path), payload)
    return SplitManifest(count=sum(shard.count for shard in shards), shards=tuple(shards))
