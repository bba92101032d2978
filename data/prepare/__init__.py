"""Sources -> shards and manifest in storage."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain

from data import store
from data.catalog import DATASETS, facts
from data.errors import DataError
from data.manifest import MANIFEST_NAME, Making, Manifest, Shard, SplitManifest, write_manifest
from data.prepare import tars
from data.prepare.inspect import Choices, Source, check_name, laid_out, layout_of, look_at, scanned
from data.prepare.layout import Layout
from data.prepare.origin import LARGEST_SHARD, check_effect, finished, making, own_shards
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

__all__ = ["Choices", "Progress", "prepare", "prepared"]

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
    check_name(name, choices, own_size=source is not None)
    if name in LARGEST_SHARD or source is None:
        check_effect(name if name in LARGEST_SHARD else "folder", choices)
        found = prepared(name, to, choices) if name in LARGEST_SHARD else None
        if found is not None:
            return found
        with laid_out(name, source, choices, run) as layout:
            return _write(layout, making(name, None, choices), to, choices, progress, run, tell)
    place = look_at(name, source)
    check_effect(place.kind, choices)
    made, kept = making(name, place, choices), place.kind == "tars" and not choices.rewrite
    # Of tars that stay as they are these say themselves what they are; what the user says too must be true.
    said = {"resolution": choices.resolution, "channels": choices.channels} if kept else {}
    wanted = {"name": name} | {fact: value for fact, value in said.items() if value is not None}
    if (found := finished(wanted, made, to, choices.again)) is not None and found.made is not None:
        clear_notes(to)
        return found
    if kept:
        return _describe_tars(name, place, made, to, choices, run)
    return _write(layout_of(name, place, choices, run), made, to, choices, progress, run, tell)


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
    for note in layout.notes:
        tell(f"note: {note}")
    facts_of_all = {
        "name": layout.name,
        "resolution": layout.form.resolution,
        "channels": layout.form.channels,
        "class_names": layout.class_names,
        "flip": layout.flip,
    }
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


def _describe_tars(name: str, source: Source, made: Making, to: str, choices: Choices, run: Runner) -> Manifest:
    """A manifest under `to` for the tars of an existing WebDataset, which stay as they are; made once."""
    root = "" if store.absolute(to).rstrip("/") == store.absolute(source.root).rstrip("/") else source.root
    if (found := finished({"name": name}, made, to, choices.again)) is not None:
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
        made=made,
    )
    write_manifest(to, manifest)
    return manifest
