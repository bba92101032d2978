"""Looks at a set in storage shard by shard: is every byte as the manifest says, and what are the images."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data import store
from data.decode import decode_shard
from data.errors import DataError
from data.manifest import Manifest, Shard, SplitManifest


@dataclass(frozen=True, kw_only=True)
class Look:
    """One shard, and how much of it to keep.

    Attributes:
        split: Its split.
        shard: Its entry in the manifest.
        keep: Images to keep for a contact sheet.
    """

    split: str
    shard: Shard
    keep: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What one shard holds.

    Attributes:
        look: The shard that was looked at.
        problem: What is wrong with it; "" if nothing is.
        labels: Images of each class, int64 of shape (classes,).
        images: Evenly spaced images, uint8 of shape (n, C, H, W).
        kept: Their labels, int64 of shape (n,).
    """

    look: Look
    problem: str
    labels: NDArray[np.int64]
    images: NDArray[np.uint8]
    kept: NDArray[np.int64]


def looks(manifest: Manifest, keep: int) -> list[Look]:
    """One look for each shard; about `keep` images of each split are kept, evenly spaced over its shards."""
    found: list[Look] = []
    for split, part in manifest.splits.items():
        edges = [keep * number // len(part.shards) for number in range(len(part.shards) + 1)]
        found += [
            Look(split=split, shard=shard, keep=min(end - start, shard.count))
            for shard, start, end in zip(part.shards, edges[:-1], edges[1:], strict=True)
        ]
    return found


def without_shards(manifest: Manifest) -> Manifest:
    """A manifest with the same facts and one shard of each split: it travels lighter."""
    splits = {
        name: SplitManifest(count=split.shards[0].count, shards=split.shards[:1])
        for name, split in manifest.splits.items()
    }
    return replace(manifest, splits=splits)


def see(look: Look, *, url: str, facts: Manifest, decode: bool) -> Iterator[Seen]:
    """Reads every byte of a shard, compares its hash, and looks at its images.

    Args:
        look: The shard.
        url: Where the manifest is.
        facts: The manifest; that of `without_shards` will do.
        decode: Whether to decode the images; else nothing is counted or kept.
    """
    source = store.join(facts.place(url), look.shard.path)
    shape = (0, facts.channels, facts.resolution, facts.resolution)
    images, labels = np.empty(shape, np.uint8), np.empty(0, np.int64)
    problem = ""
    with tempfile.TemporaryDirectory(prefix="bcm-look-") as folder:
        place = Path(folder) / "shard.tar"
        try:
            store.fetch(source, look.shard.bytes, look.shard.sha256, place, durable=False)
            if decode:
                images, labels = decode_shard(place, source, look.shard, facts)
        except DataError as error:
            problem = str(error)
    chosen = np.linspace(0, len(labels), look.keep, endpoint=False).astype(np.int64) if len(labels) else slice(0)
    yield Seen(
        look=look,
        problem=problem,
        labels=np.bincount(labels, minlength=len(facts.class_names)),
        images=images[chosen],
        kept=labels[chosen],
    )


def contact_sheet(images: Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Images of shape (C, H, W) side by side, row by row: uint8 of shape (rows*H, columns*W) or (..., 3)."""
    channels, height, width = images[0].shape
    rows = -(-len(images) // columns)
    sheet = np.zeros((rows * columns, channels, height, width), np.uint8)
    sheet[: len(images)] = np.stack(images)
    grid = sheet.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    picture = grid.reshape(rows * height, columns * width, channels)
    return picture[..., 0] if channels == 1 else picture
