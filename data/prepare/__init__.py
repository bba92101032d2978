"""Sources -> shards and manifest in storage."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from data import store
from data.catalog import DATASETS, facts
from data.errors import DataError
from data.manifest import MANIFEST_NAME, Manifest, Shard, SplitManifest, load_manifest, shard_problems, write_manifest
from data.prepare import tars
from data.prepare.inspect import Choices, Source, check_name, laid_out, look_at, scanned
from data.prepare.layout import Layout
from data.prepare.pack import SAMPLES_PER_SHARD
from data.prepare.write import Runner, clear_notes, healthy, in_turn, pending, write_shards

__all__ = ["Choices", "Progress", "prepare", "prepared"]

Progress = Callable[[str, int, int], None]
"""Called with the split, the images written so far, and the images of the split."""

_FIXED = ("digits", "cifar10")
"""Sets of which every copy is the same, so that a whole one is known without its source."""


def prepare(
    name: str,
    source: str | None,
    to: str,
    *,
    choices: Choices | None = None,
    progress: Progress | None = None,
    run: Runner = in_turn,
    tell: Callable[[str], None] = print,
) -> Manifest:
    """Writes every split of a data set, then its manifest, under the URL `to`.

    A run that was killed goes on where it was, and ends with the same bytes as an unbroken one. If the whole set is
    there already, nothing is written and `progress` is never called. The images are never in memory all at once.

    Args:
        name: Name in the catalog, or one of your own for your own images.
        source: Path or URL of the images: an archive, a folder, a zip file, an lmdb, or tars; None for digits.
        to: Any storage URL; another data set there is a DataError.
        choices: What the catalog leaves open.
        progress: Called after each shard.
        run: Where the work is done: by default here, one shard after the other.
        tell: Called with what the user should know of the source.
    """
    choices = choices or Choices()
    check_name(name, choices, own_size=source is not None)
    found = prepared(name, to, samples_per_shard=choices.samples_per_shard) if name in _FIXED else None
    if found is not None:
        return found
    if name not in _FIXED and source is not None and not choices.rewrite:
        place = look_at(name, source)
        if place.kind == "tars":
            return _describe_tars(name, place, to, choices, run)
    with laid_out(name, source, choices, run) as layout:
        for note in layout.notes:
            tell(f"note: {note}")
        return _write(layout, to, progress, run)


def prepared(name: str, to: str, *, samples_per_shard: int = SAMPLES_PER_SHARD) -> Manifest | None:
    """The manifest at `to` if this very set (digits or cifar10) is there with every shard, else None.

    A different set at `to` is a DataError, so nothing is ever overwritten by mistake.
    """
    known = facts(name)
    wanted = {
        "name": known.name,
        "resolution": known.resolution,
        "channels": known.channels,
        "class_names": known.class_names,
        "flip": known.flip,
        "images": dict(known.splits),
        "samples per shard": min(samples_per_shard, 10_000 if name == "cifar10" else max(known.splits.values())),
    }
    return _there(wanted, to)


def _there(wanted: Mapping[str, Any], to: str) -> Manifest | None:
    """The manifest at `to` if it states what is wanted and every shard is there; another set is a DataError."""
    if not store.exists(store.join(to, MANIFEST_NAME)):
        return None
    found = load_manifest(to)
    actual = {
        "name": found.name,
        "resolution": found.resolution,
        "channels": found.channels,
        "class_names": found.class_names,
        "flip": found.flip,
        "images": {split: part.count for split, part in found.splits.items()},
        "samples per shard": max(shard.count for part in found.splits.values() for shard in part.shards),
    }
    for fact, value in wanted.items():
        if actual[fact] != value:
            texts = repr(actual[fact]), repr(value)
            is_now, asked = (text if len(text) <= 100 else f"{text[:100]}..." for text in texts)
            raise DataError(
                f"{to} holds a different data set: its {fact} is {is_now}, not {asked}. "
                "Choose another URL, or remove that set first."
            )
    return None if shard_problems(to, found) else found


def _write(layout: Layout, to: str, progress: Progress | None, run: Runner) -> Manifest:
    """What is missing of the layout, then the manifest."""
    wanted = {
        "name": layout.name,
        "resolution": layout.form.resolution,
        "channels": layout.form.channels,
        "class_names": layout.class_names,
        "flip": layout.flip,
        "images": layout.counts,
        "samples per shard": max(count for shards in layout.ranges for count in shards.counts),
    }
    if (found := _there(wanted, to)) is not None:
        clear_notes(to)
        return found
    store.check_writable(to)
    # Without its manifest the set does not count as whole until the last lines.
    store.remove(store.join(to, MANIFEST_NAME))
    done, missing = pending(layout, to)
    total, counts = layout.counts, dict.fromkeys(layout.counts, 0)
    shards: dict[str, dict[int, Shard]] = {split: {} for split in total}
    for split, index, shard in chain(done, healthy(run(partial(write_shards, to=to, form=layout.form), missing))):
        shards[split][index] = shard
        counts[split] += shard.count
        if progress is not None:
            progress(split, counts[split], total[split])
    manifest = Manifest(
        name=layout.name,
        resolution=layout.form.resolution,
        channels=layout.form.channels,
        class_names=layout.class_names,
        flip=layout.flip,
        splits={
            split: SplitManifest(count=total[split], shards=tuple(found[index] for index in range(len(found))))
            for split, found in shards.items()
        },
    )
    write_manifest(to, manifest)
    clear_notes(to)
    return manifest


def _describe_tars(name: str, source: Source, to: str, choices: Choices, run: Runner) -> Manifest:
    """A manifest under `to` for the tars of an existing WebDataset, which stay as they are; made once."""
    root = "" if store.absolute(to).rstrip("/") == store.absolute(source.root).rstrip("/") else source.root
    if (found := _there({"name": name}, to)) is not None:
        return found
    store.check_writable(to)
    scans = scanned(source, run)
    resolution, channels = tars.form_of(scans, source.root)
    classes = tars.classes_of(scans, source.root)
    check_name(name, replace(choices, resolution=resolution, channels=channels))
    if choices.resolution not in (None, resolution) or choices.channels not in (None, channels):
        raise DataError(
            f"the images at {source.root} have {resolution} px and {channels} channels: leave --resolution and "
            "--channels out, or add --rewrite to make new shards of another size"
        )
    known = DATASETS.get(name)
    shards: dict[str, list[Shard]] = {}
    for scan in scans:
        offsets, sizes = [member.offset for member in scan.members], [member.size for member in scan.members]
        shard = Shard.of(scan.path, scan.bytes, scan.sha256, offsets, sizes)
        shards.setdefault(scan.split, []).append(shard)
    manifest = Manifest(
        name=name,
        resolution=resolution,
        channels=channels,
        class_names=known.class_names if known and len(known.class_names) >= len(classes) else classes,
        flip=known.flip if known else choices.flip,
        splits={
            split: SplitManifest(count=sum(shard.count for shard in found), shards=tuple(found))
            for split, found in shards.items()
        },
        root=root and store.absolute(root),
    )
    write_manifest(to, manifest)
    return manifest
