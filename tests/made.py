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


def write_numbered(folder: Path, counts: list[int], resolution: int = 2, encoding: str = "raw") -> Manifest:
    """A set with so many images in each shard, in each of which the id can be read from the pixels."""
    shards, first = [], 0
    for number, count in enumerate(counts):
        images = np.empty((count, resolution, resolution, 3), np.uint8)
        ids = np.arange(first, first + count)
        images[:] = np.stack([ids // 256, ids % 256, np.full(count, 7)], 1)[:, None, None]
        payload, *where = pack(
            [Sample(key=f"s{i}", image=image, label=i % 4) for i, image in zip(ids.tolist(), images, strict=True)],
            encoding,
        )
        (folder / f"train-{number:06d}.tar").write_bytes(payload)
        shards.append(shard_of(f"train-{number:06d}.tar", payload, *where))
        first += count
    return Manifest(
        name="made",
        resolution=resolution,
        channels=3,
        class_names=("a", "b", "c", "d"),
        flip=False,
        splits={"train": SplitManifest(count=first, shards=tuple(shards))},
    )


def budget_of(manifest: Manifest, shards: int) -> int:
    """A budget that allows for so many of the largest shards, decoded."""
    largest = max(shard.count for shard in manifest.split("train").shards)
    return shards * (largest * (8 + 3 * manifest.resolution**2) + 32)
