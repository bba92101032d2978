"""Looks at a set in storage shard by shard: is every byte as the manifest says, and what are the images."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data import store
from data.decode import decode_shard
from data.errors import DataError
from data.manifest import Manifest, Shard, SplitManifest
from data.prepare.write import Runner, in_turn

_BAR = 40


@dataclass(frozen=True, kw_only=True, eq=False)
class Examined:
    """What one shard holds.

    Attributes:
        split: Its split.
        shard: Its entry in the manifest.
        problem: What is wrong with it; "" if nothing is.
        labels: Images of each class, int64 of shape (classes,).
        images: Evenly spaced images, uint8 of shape (n, C, H, W).
        kept: Their labels, int64 of shape (n,).
    """

    split: str
    shard: Shard
    problem: str
    labels: NDArray[np.int64]
    images: NDArray[np.uint8]
    kept: NDArray[np.int64]


def examined(
    url: str,
    manifest: Manifest,
    keep: int | None,
    run: Runner = in_turn,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Examined]:
    """All shards of a set, in the order in which they are read: every byte, compared with the hash.

    Args:
        url: Where the manifest is.
        manifest: The manifest.
        keep: Images of each split to keep, about, evenly spaced over its shards; None to decode and count none.
        run: Where the work is done: by default here, one shard after the other.
        progress: Called after each shard with the shards that were read and those there are.
    """
    shards: list[tuple[str, Shard, int]] = []
    for split, part in manifest.splits.items():
        edges = [(keep or 0) * number // len(part.shards) for number in range(len(part.shards) + 1)]
        shards += [
            (split, shard, min(end - start, shard.count))
            for shard, start, end in zip(part.shards, edges[:-1], edges[1:], strict=True)
        ]
    # With one shard of each split the manifest travels lighter.
    splits = {
        split: SplitManifest(count=part.shards[0].count, shards=part.shards[:1])
        for split, part in manifest.splits.items()
    }
    call = partial(_examine, url=url, facts=replace(manifest, splits=splits), decode=keep is not None)
    for number, found in enumerate(run(call, shards), start=1):
        if progress is not None:
            progress(number, len(shards))
        yield found


def _examine(task: tuple[str, Shard, int], *, url: str, facts: Manifest, decode: bool) -> Iterator[Examined]:
    """Reads one shard, given with its split and how many images to keep."""
    split, shard, keep = task
    source = store.join(facts.place(url), shard.path)
    shape = (0, facts.channels, facts.resolution, facts.resolution)
    images, labels = np.empty(shape, np.uint8), np.empty(0, np.int64)
    problem = ""
    with tempfile.TemporaryDirectory(prefix="bcm-look-") as folder:
        place = Path(folder) / "shard.tar"
        try:
            store.fetch(source, shard.bytes, shard.sha256, place, durable=False)
            if decode:
                images, labels = decode_shard(place, source, shard, facts)
        except DataError as error:
            problem = str(error)
    chosen = np.linspace(0, len(labels), keep, endpoint=False).astype(np.int64) if len(labels) else slice(0)
    yield Examined(
        split=split,
        shard=shard,
        problem=problem,
        labels=np.bincount(labels, minlength=len(facts.class_names)),
        images=images[chosen],
        kept=labels[chosen],
    )


def require_sound(url: str, problems: Sequence[str]) -> None:
    """One DataError for all shards of a set that are not as they should be."""
    if problems:
        listed = "\n  ".join(problems)
        raise DataError(f"{len(problems)} shards of {url} are not as its manifest says:\n  {listed}")


def contact_sheet(images: Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Images of shape (C, H, W) side by side, row by row: uint8 of shape (rows*H, columns*W) or (..., 3)."""
    channels, height, width = images[0].shape
    rows = -(-len(images) // columns)
    sheet = np.zeros((rows * columns, channels, height, width), np.uint8)
    sheet[: len(images)] = np.stack(images)
    grid = sheet.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    picture = grid.reshape(rows * height, columns * width, channels)
    return picture[..., 0] if channels == 1 else picture


def describe(manifest: Manifest, url: str) -> str:
    """One line for the set and one for each split."""
    lines = [f"{manifest.name} at {url} (manifest {manifest.sha256[:12]})"]
    for split, part in manifest.splits.items():
        megabytes = sum(shard.bytes for shard in part.shards) / 1e6
        lines.append(f"  {split:6s} {part.count:>7,} images in {len(part.shards)} shards, {megabytes:.1f} MB")
    return "\n".join(lines)


def report(manifest: Manifest, url: str, shards: Sequence[Examined]) -> str:
    """What is in a set: splits, form of the images, and a histogram of each split."""
    flip = "allowed" if manifest.flip else "not allowed"
    size = f"{manifest.resolution}x{manifest.resolution}, {manifest.channels} channels"
    lines = [describe(manifest, url), f"{size}; mirroring {flip}; {len(manifest.class_names)} classes"]
    for split in manifest.splits:
        counts = np.sum([shard.labels for shard in shards if shard.split == split], axis=0)
        lines.append(histogram(split, manifest.class_names, counts))
    return "\n".join(lines)


def histogram(split: str, names: Sequence[str], counts: NDArray[np.int64]) -> str:
    """A bar for each class of a split; of many classes only the 10 least and the 10 most frequent."""
    order = list(range(len(names)))
    title = f"{split}: images of each class"
    if len(names) > _BAR:
        ranked = sorted(order, key=lambda label: (counts[label], label))
        order, title = ranked[:10] + ranked[-10:], f"{split}: the 10 rarest and the 10 most frequent classes"
    width = max(len(names[label]) for label in order)
    lines = [
        f"  {names[label]:{width}s} {counts[label]:>9,} {'#' * round(_BAR * counts[label] / max(1, counts.max()))}"
        for label in order
    ]
    return "\n".join([title, *lines])
