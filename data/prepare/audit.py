"""Looks at a set in storage shard by shard: is every byte as the manifest says, and is every image one."""

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data import store
from data.decode import decode_images, mapped, read_labels
from data.errors import DataError
from data.manifest import Manifest, Shard, SplitManifest, load_manifest
from data.prepare.write import Runner, in_turn

_BAR = 40
_NAMED = 10
_DECODED_BYTES = 64 * 2**20
"""Of a shard so much is decoded at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Examined:
    """What one shard holds.

    Attributes:
        split: Its split.
        shard: Its entry in the manifest.
        problems: What is wrong with it and its images.
        labels: Images of each class, int64 of shape (classes,).
        images: Evenly spaced images, uint8 of shape (n, C, H, W).
        kept: Their labels, int64 of shape (n,).
    """

    split: str
    shard: Shard
    problems: tuple[str, ...]
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
    chosen = np.linspace(0, shard.count, keep, endpoint=False).astype(np.int64)
    images = np.empty((0, facts.channels, facts.resolution, facts.resolution), np.uint8)
    labels = np.empty(0, np.int64)
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bcm-look-") as folder:
        place = Path(folder) / "shard.tar"
        try:
            store.fetch(source, shard.bytes, shard.sha256, place, durable=False)
            if decode:
                labels = read_labels(place, source, shard, facts)
                images = _decoded(place, source, shard, facts, chosen, problems)
        except DataError as error:
            problems.append(str(error))
    yield Examined(
        split=split,
        shard=shard,
        problems=tuple(problems),
        labels=np.bincount(labels, minlength=len(facts.class_names)),
        images=images,
        kept=labels[chosen] if len(labels) else labels,
    )


def _decoded(
    place: Path, source: str, shard: Shard, facts: Manifest, chosen: NDArray[np.int64], problems: list[str]
) -> NDArray[np.uint8]:
    """Decodes every image, some at a time: those that are chosen; the problems of others are added to `problems`."""
    raw, kept = mapped(place), []
    at_once = max(1, _DECODED_BYTES // (facts.channels * facts.resolution**2))
    for first in range(0, shard.count, at_once):
        offsets, sizes = shard.offsets[first : first + at_once], shard.sizes[first : first + at_once]
        try:
            images = decode_images(raw, offsets, sizes, facts, source)
        except DataError:
            # One by one, so that each that is damaged is named.
            images = np.zeros((len(offsets), facts.channels, facts.resolution, facts.resolution), np.uint8)
            for index in range(len(offsets)):
                try:
                    one = slice(index, index + 1)
                    images[one] = decode_images(raw, offsets[one], sizes[one], facts, source)
                except DataError as error:
                    problems.append(str(error))
        kept.append(images[chosen[(chosen >= first) & (chosen < first + len(images))] - first])
    return np.concatenate(kept)


def _all_sound(
    url: str, keep: int | None, run: Runner, progress: Callable[[str, int, int], None] | None
) -> tuple[Manifest, list[Examined]]:
    """The manifest of a set and all its shards in their order; what is wrong with any is a DataError."""
    manifest = load_manifest(url)
    told = None if progress is None else partial(progress, "shards")
    here = partial(run, here=store.is_local(manifest.place(url)))
    shards = sorted(examined(url, manifest, keep, here, told), key=lambda found: (found.split, found.shard.path))
    require_sound(url, manifest, shards)
    return manifest, shards


def verified(
    url: str, *, decode: bool, run: Runner = in_turn, progress: Callable[[str, int, int], None] | None = None
) -> str:
    """Compares every byte of a set with its manifest, and may decode every image; what to say if all is well."""
    manifest, _ = _all_sound(url, 0 if decode else None, run, progress)
    return f"{describe(manifest, url)}\nevery byte is as the manifest says" + (
        ", and every image can be decoded" if decode else ""
    )


def inspected(
    url: str, picture: str, *, run: Runner = in_turn, progress: Callable[[str, int, int], None] | None = None
) -> str:
    """Reads a set and draws 100 images of each split, as a PNG file at `picture`; a report of what is in the set."""
    manifest, shards = _all_sound(url, 100, run, progress)
    images = [image for found in shards for image in found.images]
    buffer = io.BytesIO()
    Image.fromarray(contact_sheet(images, columns=20)).save(buffer, format="PNG")
    store.write_bytes(picture, buffer.getvalue())
    return f"{report(manifest, url, shards)}\n{len(images)} images in {picture}"


def require_sound(url: str, manifest: Manifest, shards: Sequence[Examined]) -> None:
    """One DataError for all shards of a set that are not as they should be."""
    bad = sorted((found.shard.path, found.problems) for found in shards if found.problems)
    problems = [problem for _, found in bad for problem in found]
    if not problems:
        return
    listed = "\n  ".join(problems[:_NAMED])
    more = f"\n  and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    remedy = (
        f"Replace these images and run python -m pipelines.prepare {manifest.name} again with --again; or add "
        f"--rewrite --resolution {manifest.resolution} --skip-bad {len(problems)} --to ANOTHER_URL to write new shards "
        "without those that cannot be read."
        if manifest.root
        else f"Copy these shards again from a good source, or make the set anew: python -m pipelines.prepare "
        f"{manifest.name} with --again and its source."
    )
    raise DataError(f"{len(bad)} shards of {url} are not as its manifest says:\n  {listed}{more}\n{remedy}")


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
