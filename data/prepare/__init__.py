"""Sources -> shards and manifest in storage."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from data import store
from data.catalog import DATASETS, facts
from data.errors import DataError
from data.manifest import (
    MANIFEST_NAME,
    Making,
    Manifest,
    Shard,
    SplitManifest,
    load_manifest,
    shard_problems,
    write_manifest,
)
from data.prepare import tars
from data.prepare.inspect import Choices, Source, check_name, laid_out, layout_of, look_at, scanned
from data.prepare.layout import Layout
from data.prepare.origin import LARGEST_SHARD, check_effect, difference, making
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
    made = making(name, place, choices)
    if (found := _there({"name": name}, made, to, choices.again)) is not None and found.made is not None:
        clear_notes(to)
        return found
    if place.kind == "tars" and not choices.rewrite:
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
    return _there(wanted, making(name, None, choices), to, choices.again)


def _there(wanted: Mapping[str, Any], made: Making, to: str, again: bool) -> Manifest | None:
    """The manifest at `to` if it states what is wanted, was made so, and every shard is there.

    Another set is a DataError; so is the same set made otherwise, unless it is to be made again.
    """
    if not store.exists(store.join(to, MANIFEST_NAME)):
        return None
    found = load_manifest(to)
    if again and found.name == wanted["name"]:
        return None
    actual = {
        "name": found.name,
        "resolution": found.resolution,
        "channels": found.channels,
        "class_names": found.class_names,
        "flip": found.flip,
        "images": {split: part.count for split, part in found.splits.items()},
        "samples per shard": max(shard.count for part in found.splits.values() for shard in part.shards),
    }
    # What a set was made of and how decides these two.
    known = {"images", "samples per shard"} if found.made else set[str]()
    for fact, value in wanted.items():
        if fact not in known and actual[fact] != value:
            texts = repr(actual[fact]), repr(value)
            is_now, asked = (text if len(text) <= 100 else f"{text[:100]}..." for text in texts)
            raise DataError(
                f"{to} holds a different data set: its {fact} is {is_now}, not {asked}. "
                "Choose another URL, or remove that set first."
            )
    if (problem := difference(found, made)) is not None:
        raise DataError(
            f"{to} holds a finished set, but {problem}. Choose another URL, or add --again to make the set anew."
        )
    return None if shard_problems(to, found) else found


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
    total, form = layout.counts, layout.form
    wanted = {
        "name": layout.name,
        "resolution": form.resolution,
        "channels": form.channels,
        "class_names": layout.class_names,
        "flip": layout.flip,
        "images": total,
        "samples per shard": max(count for shards in layout.ranges for count in shards.counts),
    }
    if (found := _there(wanted, made, to, choices.again)) is not None:
        clear_notes(to)
        return found
    store.check_writable(to)
    # Without its manifest the set does not count as whole until the last lines.
    store.remove(store.join(to, MANIFEST_NAME))
    leave_out, left_out = choices.skip_bad is not None, list[str]()
    done, missing = pending(layout, to, leave_out)
    call = partial(write_shards, to=to, form=form, leave_out=leave_out)
    written: dict[str, dict[int, Note]] = {split: {} for split in total}
    counts = dict.fromkeys(total, 0)
    most = most_left_out(choices.skip_bad, sum(total.values()))
    for split, index, note in healthy(chain(done, run(call, missing)), most, left_out):
        written[split][index] = note
        counts[split] += note.shard.count + len(note.left_out)
        if progress is not None:
            progress(split, counts[split], total[split])
    for split, notes in written.items():
        if not notes:
            raise DataError(f"no image of the split {split} can be used, for example {min(left_out)}")
    _tell_of(written, left_out, to, tell)
    splits = {
        split: SplitManifest(
            count=sum(note.shard.count for note in notes.values()),
            shards=tuple(notes[index].shard for index in sorted(notes)),
        )
        for split, notes in written.items()
    }
    manifest = Manifest(
        name=layout.name,
        resolution=form.resolution,
        channels=form.channels,
        class_names=layout.class_names,
        flip=layout.flip,
        splits=splits,
        made=replace(made, left_out={split: total[split] - part.count for split, part in splits.items()}),
    )
    write_manifest(to, manifest)
    clear_notes(to)
    return manifest


def _tell_of(
    written: Mapping[str, Mapping[int, Note]], left_out: list[str], to: str, tell: Callable[[str], None]
) -> None:
    """Tells what was done with images that their owner should know, and lists those that were left out."""
    remarks: dict[str, tuple[int, str]] = {}
    for notes in written.values():
        for index in sorted(notes):
            add(remarks, notes[index].remarks)
    for remark, (count, example) in remarks.items():
        tell(f"note: {count:,} images {remark}, for example {example}")
    place = store.join(to, LEFT_OUT)
    store.remove(place)
    if left_out:
        store.write_bytes(place, "".join(f"{problem}\n" for problem in sorted(left_out)).encode())
        tell(f"note: {len(left_out):,} images are left out, as {place} lists, for example {min(left_out)}")


def _describe_tars(name: str, source: Source, made: Making, to: str, choices: Choices, run: Runner) -> Manifest:
    """A manifest under `to` for the tars of an existing WebDataset, which stay as they are; made once."""
    root = "" if store.absolute(to).rstrip("/") == store.absolute(source.root).rstrip("/") else source.root
    if (found := _there({"name": name}, made, to, choices.again)) is not None:
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
