"""From a name and a source to a layout: which kind of source it is, and what is to be written from it."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from data import store
from data.catalog import DATASETS, facts
from data.errors import DataError
from data.prepare import cifar10, digits, files, imagenet64, lsun, tars
from data.prepare.assign import Assigned, Rules, assign, is_image
from data.prepare.files import File, archive_kind
from data.prepare.layout import Layout, Stretch, shard_ranges
from data.prepare.pack import SAMPLES_PER_SHARD, Form, default_encoding
from data.prepare.write import Runner

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the user may decide. None takes what the catalog says, or what is usual.

    Attributes:
        resolution: Height and width; needed for images of your own, which are cropped to their centre and resized.
        channels: 1 (grey) or 3 (RGB) for images of your own, by default 3.
        flip: Training may mirror images of your own; the catalog knows it of its sets.
        encoding: raw, png or webp, all without loss; by default raw up to 64 px and webp above.
        held_out: Images for the test split where the source marks none; by default a tenth, at most 1,000.
        samples_per_shard: Images in a shard.
        rewrite: Crop and resize an existing WebDataset into new shards, rather than describe its tars as they are.
        labels: Where labels come from, if that is not plain: folder, none, a table in the source (dataset.json, csv:FILE),
            or small files beside the images, by their suffix (.cls, .json, .txt).
        classes: Number of classes, where labels are numbers of which some never occur.
    """

    resolution: int | None = None
    channels: int | None = None
    flip: bool = False
    encoding: str | None = None
    held_out: int | None = None
    samples_per_shard: int = SAMPLES_PER_SHARD
    rewrite: bool = False
    labels: str | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        """Checks what no later step would."""
        if self.samples_per_shard < 1:
            raise DataError(f"samples per shard is {self.samples_per_shard}: give at least 1")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where images come from.

    Attributes:
        root: URL of the folder.
        listing: Bytes of each file in it, by path.
        kind: "npz", "lmdb", "archives" (zip files and tars) or "folder".
    """

    root: str
    listing: Mapping[str, int]
    kind: str

    @property
    def archives(self) -> tuple[str, ...]:
        """Paths of its zip files and tars."""
        return tuple(path for path in self.listing if self.kind == "archives" and is_archive(path))

    @property
    def is_webdataset(self) -> bool:
        """Whether it is plain tars alone, which may be trained on as they lie."""
        return self.kind == "archives" and {archive_kind(path) for path in self.archives} == {"tar"}


def check_name(name: str, choices: Choices, *, own_size: bool = False) -> None:
    """Whether the catalog knows the set and the choices do not contradict it, or it is one of the user's own.

    Args:
        name: Name of the set.
        choices: What the user decided.
        own_size: Whether a set of the user's own says by itself how large its images are.
    """
    known = DATASETS.get(name)
    if known is None:
        if choices.resolution is None and not own_size:
            try:
                facts(name)
            except DataError as error:
                raise DataError(
                    f"{error}. For images of your own, under a name of your own, give their --resolution"
                ) from None
        if not _NAME.fullmatch(name):
            raise DataError(f"the name {name!r} must be of a-z, 0-9, '.', '_' and '-'")
        return
    for option, fact, chosen in (
        ("resolution", known.resolution, choices.resolution),
        ("channels", known.channels, choices.channels),
        ("flip", known.flip, choices.flip or None),
    ):
        if chosen not in (None, fact):
            raise DataError(f"{name} has {option} {fact}, not {chosen}: leave that out, or choose a name of your own")


def look_at(name: str, source: str) -> Source:
    """What kind of source that is, from its listing alone."""
    listing = files.listed(source)
    if listing.keys() == {""}:
        root, _, file = source.rpartition("/")
        source, listing = root or ("/" if source.startswith("/") else "."), {file: listing[""]}
    if not listing:
        raise DataError(f"there are no files at {source}: check the path")
    names = {PurePosixPath(path).name for path in listing}
    if name == "imagenet64" and any(map(imagenet64.BATCH.fullmatch, names)):
        return Source(root=source, listing=listing, kind="npz")
    if lsun.DATABASE in names:
        return Source(root=source, listing=listing, kind="lmdb")
    archives = [path for path in listing if is_archive(path)]
    images = [path for path in listing if is_image(File(name=path, size=0))]
    if archives and images:
        raise DataError(
            f"{source} holds {len(images):,} images (such as {images[0]}) and {len(archives):,} archives (such as "
            f"{archives[0]}), and may hold the same images twice: move the one or the other elsewhere"
        )
    return Source(root=source, listing=listing, kind="archives" if archives else "folder")


def is_archive(path: str) -> bool:
    """Whether a file of a source is an archive that is read."""
    return archive_kind(path) is not None and not File(name=path, size=0).hidden


def check_apart(source: Source, to: str, choices: Choices) -> None:
    """Whether what is written stays out of the source, where another run would take it for images."""
    root, place = (os.path.realpath(url) if store.is_local(url) else url.rstrip("/") for url in (source.root, to))
    inside = f"{place}/".startswith(f"{root.rstrip('/')}/") and len(source.listing) != 1
    if inside and not (source.is_webdataset and not choices.rewrite):
        raise DataError(f"{to} lies in the source {source.root}, of which it would become a part: write elsewhere")


@contextmanager
def laid_out(name: str, source: str | None, choices: Choices, run: Runner) -> Iterator[Layout]:
    """The layout of a data set, valid as long as the block lasts."""
    check_name(name, choices, own_size=source is not None)
    if name == "digits":
        if source is not None:
            raise DataError(
                f"digits comes with scikit-learn and takes no source, but {source!r} was given: leave it out"
            )
        counts = facts(name).splits
        stretches = {
            split: [Stretch(kind="digits", images=split, count=counts[split], read=digits.samples)] for split in counts
        }
        yield _layout(name, choices, stretches, labels=digits.labels(), labels_from="scikit-learn")
    elif name == "cifar10":
        if source is None:
            raise DataError(
                "cifar10 needs a source: the path or URL of cifar-10-python.tar.gz or its unpacked folder, "
                f"for example {cifar10.DOWNLOAD_URL}"
            )
        with cifar10.unpacked(source) as folder:
            yield _layout(name, choices, cifar10.stretches(folder), labels=cifar10.labels(folder), labels_from="the batches")
    elif source is None:
        known = f": {facts(name).source_note}" if name in DATASETS else ""
        raise DataError(f"{name} needs a source, the path or URL of its images{known}")
    else:
        with opened(look_at(name, source), choices, run) as listed:
            yield layout_of(name, listed, choices)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A source that can be read from.

    Attributes:
        source: The source.
        files: Its files and those in its archives.
        scans: What each of its tars holds.
        places: URL of each archive.
    """

    source: Source
    files: tuple[File, ...] = ()
    scans: tuple[tars.Scan, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def opened(source: Source, choices: Choices, run: Runner) -> Iterator[Opened]:
    """Lists the files of a source; archives are read for that, and lie unpacked as long as the block lasts."""
    if source.kind in ("npz", "lmdb"):
        yield Opened(source=source)
        return
    loose = [File(name=name, size=size) for name, size in source.listing.items() if name not in source.archives]
    with tars.unpacked(source.root, source.archives) as places:
        paths = [path for path in source.archives if archive_kind(path) != "zip"]
        scan = partial(tars.scan, root=source.root, places=places, chosen=choices.labels)
        scans = {scan.path: scan for scan in run(scan, paths)}
        found = loose
        for path in source.archives:
            found += scans[path].files if path in scans else files.zip_files(places[path], path)
        ordered = tuple(scans[path] for path in paths)
        yield Opened(source=source, files=tuple(found), scans=ordered, places=places)


def layout_of(name: str, listed: Opened, choices: Choices) -> Layout:
    """The layout of the images of a source."""
    source = listed.source
    root, size, held_out = source.root, choices.samples_per_shard, choices.held_out
    if source.kind == "npz":
        stretches, labels, notes = imagenet64.batches(source.listing, root)
        return _layout(name, choices, stretches, labels=labels, labels_from="the batches", notes=notes)
    if source.kind == "lmdb":
        stretches = lsun.databases(source.listing, root, size=size, held_out=held_out)
        return _layout(name, choices, stretches, classes=None if name in DATASETS else ("all",))
    kept = source.is_webdataset and not choices.rewrite
    rules = Rules(
        labels=choices.labels,
        class_names=facts(name).class_names if name in DATASETS else (),
        classes=choices.classes,
        held_out=held_out,
        kept=kept,
    )
    images = assign(listed.files, root, rules, partial(files.contents, root, listed.places))
    labels = {
        split: tuple(np.bincount([item.label for item in items], minlength=len(images.class_names)).tolist())
        for split, items in images.splits.items()
    }
    if kept:
        return _kept(name, listed, choices, images, labels)
    check_name(name, choices)
    read = partial(files.entries, root, listed.places)
    stretches = {
        split: [
            Stretch(kind=source.kind, images=group, count=len(group), read=read)
            for group in (items[start : start + size] for start in range(0, len(items), size))
        ]
        for split, items in images.splits.items()
    }
    layout = _layout(name, choices, stretches, classes=images.class_names, labels=labels, notes=images.notes)
    return replace(layout, labels_from=images.labels_from)


def _kept(
    name: str, listed: Opened, choices: Choices, images: Assigned, labels: Mapping[str, tuple[int, ...]]
) -> Layout:
    """The layout of tars that stay as they are."""
    root, known = listed.source.root, DATASETS.get(name)
    shards = tars.kept(root, listed.scans, images.splits)
    resolution, channels = tars.form_of(listed.scans, root)
    check_name(name, replace(choices, resolution=resolution, channels=channels))
    if choices.resolution not in (None, resolution) or choices.channels not in (None, channels):
        raise DataError(
            f"the images at {root} have {resolution} px and {channels} channels: leave --resolution and --channels out, "
            "or add --rewrite to make new shards of another size"
        )
    return Layout(
        name=name,
        form=Form(resolution=resolution, channels=channels, encoding=default_encoding(resolution)),
        class_names=images.class_names,
        flip=known.flip if known else choices.flip,
        ranges=(),
        labels=labels,
        labels_from=images.labels_from,
        notes=images.notes,
        kept=shards,
    )


def _layout(
    name: str,
    choices: Choices,
    stretches: Mapping[str, list[Stretch]],
    *,
    classes: tuple[str, ...] | None = None,
    labels: Mapping[str, tuple[int, ...]] | None = None,
    labels_from: str = "",
    notes: tuple[str, ...] = (),
) -> Layout:
    """The layout; where `classes` is None they are those of the catalog, where `labels` is there is one class."""
    known = DATASETS.get(name)
    resolution = known.resolution if known else choices.resolution or 0
    channels = known.channels if known else choices.channels or 3
    encoding = choices.encoding or default_encoding(resolution)
    names = facts(name).class_names if classes is None else classes
    layout = Layout(
        name=name,
        form=Form(resolution=resolution, channels=channels, encoding=encoding),
        class_names=names,
        flip=known.flip if known else choices.flip,
        ranges=tuple(
            shards for split in stretches for shards in shard_ranges(split, stretches[split], choices.samples_per_shard)
        ),
        labels=labels or {split: (sum(part.count for part in parts),) for split, parts in stretches.items()},
        labels_from=labels_from,
        notes=notes,
    )
    if known is None or layout.counts == dict(known.splits):
        return layout
    published = ", ".join(f"{count:,} {split}" for split, count in known.splits.items())
    found = ", ".join(f"{count:,} {split}" for split, count in layout.counts.items())
    return replace(layout, notes=(*notes, f"the source holds {found} images, but {name} has {published}"))
