"""Sources -> shards and manifest in storage."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from data import store
from data.catalog import DATASETS, facts
from data.errors import DataError
from data.manifest import MANIFEST_NAME, Making, Manifest, SplitManifest, write_manifest
from data.prepare.inspect import Choices, check_name, laid_out
from data.prepare.layout import Layout
from data.prepare.origin import LARGEST_SHARD, check_effect, finished, making, own_shards
from data.prepare.source import Source, check_apart, look_at
from data.prepare.summary import describe, forecast
from data.prepare.write import (
    LEFT_OUT,
    Note,
    Runner,
    add,
    clear_notes,
    healthy,
    in_turn,
    most_left_out,
    pending,
    write_shards,
)

__all__ = ["Choices", "Progress", "dry_run", "prepare", "prepared"]

Progress = Callable[[str, int, int], None]
"""Called with the split, the images written so far, and the images of the split."""


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
    place, made, found = _begun(name, source, to, choices)
    if found is not None:
        return found
    here = partial(run, here=_bound(name, source, place, to))
    with laid_out(name, source, place, choices, here) as layout:
        for line in _told(layout):
            tell(line)
        if layout.kept:
            return _keep(layout, made, to)
        return _write(layout, made, to, choices, progress, here, tell)


def dry_run(
    name: str, source: str | None, to: str, *, choices: Choices | None = None, run: Runner = in_turn
) -> Iterator[str]:
    """What `prepare` would find and make, in lines; nothing is kept of what is written to try the place.

    Raises:
        DataError: As `prepare` does, as far as it can be seen without reading all images.
    """
    choices = choices or Choices()
    place, _, found = _begun(name, source, to, choices)
    if found is not None:
        yield f"{to} holds this set already: nothing would be written"
        return
    with laid_out(name, source, place, choices, partial(run, here=_bound(name, source, place, to))) as layout:
        yield from _told(layout)
        yield forecast(layout, to)


def _begun(name: str, source: str | None, to: str, choices: Choices) -> tuple[Source | None, Making, Manifest | None]:
    """The source, listed; what the set would be made of; and its manifest, if the very set is there already."""
    fixed = name in LARGEST_SHARD
    check_name(name, choices, own_size=source is not None)
    place = None if fixed or source is None else look_at(name, source)
    check_effect(place.kind if place else name if fixed else "folder", choices)
    made = making(name, place, choices)
    if place is None:
        return None, made, prepared(name, to, choices) if fixed else None
    kept = place.kind == "tars" and not choices.rewrite
    if place.kind == "archives" and name not in DATASETS and choices.resolution is None:
        raise DataError(
            f"the images of {source} are written anew, as they are not in plain tars alone: give --resolution"
        )
    check_name(name, choices, own_size=kept)
    if not kept:
        check_apart(source or "", to)
    # Of tars that stay as they are these say themselves what they are; what the user says too must be true.
    said = {"resolution": choices.resolution, "channels": choices.channels} if kept else {}
    wanted = {"name": name} | {fact: value for fact, value in said.items() if value is not None}
    found = finished(wanted, made, to, choices.again)
    if found is None or found.made is None:
        return place, made, None
    clear_notes(to)
    return place, made, found


def _bound(name: str, source: str | None, place: Source | None, to: str) -> bool:
    """Whether the work is bound to this machine, as something is read or written on its disks."""
    unpacked = name == "cifar10" or (place is not None and place.kind == "archives")
    return unpacked or store.is_local(to) or (source is not None and store.is_local(source))


def _told(layout: Layout) -> list[str]:
    """What the user should know before anything is written."""
    return [*(f"note: {note}" for note in layout.notes), describe(layout)]


def prepared(name: str, to: str, choices: Choices | None = None) -> Manifest | None:
    """The manifest at `to` if this very set (digits or cifar10) is there with every shard, else None.

    A different set at `to` is a DataError, so nothing is ever overwritten by mistake.
    """
    known, choices = facts(name), choices or Choices()
    wanted = {
        "name": known.name,
        "resolution": known.resolution,
        "channels": known.channels,
        "class_names": known.class_names,
        "flip": known.flip,
        "images": dict(known.splits),
        "samples per shard": min(choices.samples_per_shard, LARGEST_SHARD[name]),
    }
    return finished(wanted, making(name, None, choices), to, choices.again)


def _write(
    layout: Layout,
    made: Making,
    to: str,
    choices: Choices,
    progress: Progress | None,
    run: Runner,
    tell: Callable[[str], None],
) -> Manifest:
    """What is missing of the layout, then the manifest."""
    facts_of_all = _facts(layout)
    largest = max(count for shards in layout.ranges for count in shards.counts)
    wanted = facts_of_all | {"images": layout.counts, "samples per shard": largest}
    if (found := finished(wanted, made, to, choices.again)) is not None:
        clear_notes(to)
        return found
    store.check_writable(to)
    before = own_shards(to)
    # Without its manifest the set does not count as whole until the last lines.
    store.remove(store.join(to, MANIFEST_NAME))
    notes, problems = _shards(layout, to, choices, progress, run)
    _tell_of(notes, problems, to, tell)
    shards = {split: tuple(note.shard for note in found) for split, found in notes.items()}
    splits = {split: SplitManifest(count=sum(s.count for s in found), shards=found) for split, found in shards.items()}
    left_out = {split: count - splits[split].count for split, count in layout.counts.items()}
    manifest = Manifest(**facts_of_all, splits=splits, made=replace(made, left_out=left_out))
    write_manifest(to, manifest)
    clear_notes(to)
    for path in before - {shard.path for found in shards.values() for shard in found}:
        store.remove(store.join(to, path))
    return manifest


def _shards(
    layout: Layout, to: str, choices: Choices, progress: Progress | None, run: Runner
) -> tuple[dict[str, list[Note]], list[str]]:
    """Writes the shards that are missing: the notes of all by split, in order, and the problems of what is left out."""
    total, leave_out = layout.counts, choices.skip_bad is not None
    done, missing = pending(layout, to, leave_out)
    call = partial(write_shards, to=to, form=layout.form, leave_out=leave_out)
    written: dict[str, dict[int, Note]] = {split: {} for split in total}
    counts, left_out = dict.fromkeys(total, 0), list[str]()
    most = most_left_out(choices.skip_bad, sum(total.values()))
    for split, index, note in healthy(chain(done, run(call, missing)), most, left_out):
        written[split][index] = note
        counts[split] += note.shard.count + len(note.left_out)
        if progress is not None:
            progress(split, counts[split], total[split])
    for split, notes in written.items():
        if not notes:
            raise DataError(f"no image of the split {split} can be used, for example {min(left_out)}")
    return {split: [notes[index] for index in sorted(notes)] for split, notes in written.items()}, left_out


def _tell_of(notes: Mapping[str, list[Note]], problems: list[str], to: str, tell: Callable[[str], None]) -> None:
    """Tells what was done with images that their owner should know, and lists those that were left out."""
    remarks: dict[str, tuple[int, str]] = {}
    for note in chain.from_iterable(notes.values()):
        add(remarks, note.remarks)
    for remark, (count, example) in remarks.items():
        tell(f"note: {count:,} images {remark}, for example {example}")
    place = store.join(to, LEFT_OUT)
    store.remove(place)
    if problems:
        store.write_bytes(place, "".join(f"{problem}\n" for problem in sorted(problems)).encode())
        tell(f"note: {len(problems):,} images are left out, as {place} lists, for example {min(problems)}")


def _facts(layout: Layout) -> dict[str, Any]:
    return {
        "name": layout.name,
        "resolution": layout.form.resolution,
        "channels": layout.form.channels,
        "class_names": layout.class_names,
        "flip": layout.flip,
    }


def _keep(layout: Layout, made: Making, to: str) -> Manifest:
    """A manifest under `to` for the tars of an existing WebDataset, which stay as they are; made once."""
    store.check_writable(to)
    root = "" if store.absolute(to).rstrip("/") == store.absolute(layout.root).rstrip("/") else layout.root
    splits = {
        split: SplitManifest(count=sum(shard.count for shard in found), shards=found)
        for split, found in layout.kept.items()
    }
    manifest = Manifest(**_facts(layout), splits=splits, root=root and store.absolute(root), made=made)
    write_manifest(to, manifest)
    return manifest
