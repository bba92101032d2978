"""From a name and a source to a layout: which kind of source it is, and what is to be written from it."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from data.catalog import DATASETS, facts
from data.errors import DataError
from data.prepare import cifar10, digits, fashion_mnist, files, imagenet64, lsun, tars
from data.prepare.assign import Assigned, Rules, assign
from data.prepare.layout import Layout, Stretch, shard_ranges
from data.prepare.pack import SAMPLES_PER_SHARD, Filter, Fit, Form, default_encoding
from data.prepare.source import Opened, Source, opened
from data.prepare.write import Runner, most_left_out

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
        labels: Where labels come from, if that is not plain: folder, none, a table in the source (dataset.json,
            csv:FILE), or small files beside the images, by their suffix (.cls, .json, .txt).
        classes: Number of classes, where labels are numbers of which some never occur.
        fit: How an image becomes a square: its middle is cut out (crop), the whole is laid on the background (pad) or
            stretched, or it must be one of the right size (none); or exactly as the reference statistics of that name
            were made.
        filter: How pixels are put together: their mean by area, or Pillow's lanczos or bicubic.
        small: Whether images that are too small are refused, or enlarged (bicubic, or lanczos if that is the filter).
        background: Colour below transparent parts and around padded images: a name or #rrggbb.
        skip_bad: Leave out images that cannot be read or are too small: at most so many (20), or a share (1%); what is
            left out is listed in left-out.txt beside the manifest.
        again: Make a finished set anew, where its source or the options are not what it was made with.
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
    fit: Fit = "crop"
    filter: Filter = "area"
    small: Literal["refuse", "enlarge"] = "refuse"
    background: str = "black"
    skip_bad: str | None = None
    again: bool = False

    def __post_init__(self) -> None:
        """Checks what no later step would."""
        most_left_out(self.skip_bad, 1)
        if self.samples_per_shard < 1:
            raise DataError(f"samples per shard is {self.samples_per_shard}: give at least 1")


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


@contextmanager
def laid_out(name: str, source: str | None, place: Source | None, choices: Choices, run: Runner) -> Iterator[Layout]:
    """The layout of a data set, valid as long as the block lasts; `place` is the source as `look_at` sees it."""
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
            yield _layout(
                name, choices, cifar10.stretches(folder), labels=cifar10.labels(folder), labels_from="the batches"
            )
    elif place is None:
        known = f": {facts(name).source_note}" if name in DATASETS else ""
        raise DataError(f"{name} needs a source, the path or URL of its images{known}")
    else:
        with opened(place, choices.labels, run) as listed:
            yield layout_of(name, listed, choices)


def layout_of(name: str, listed: Opened, choices: Choices) -> Layout:
    """The layout of the images of a source."""
    source, root, size = listed.source, listed.source.root, choices.samples_per_shard
    if source.kind == "npz":
        stretches, labels, notes = imagenet64.batches(source.listing, root)
        stretches = _of_version(stretches, source)
        return _layout(name, choices, stretches, labels=labels, labels_from="the batches", notes=notes)
    if source.kind == "idx":
        stretches, labels = fashion_mnist.stretches(source.files, root)
        return _layout(name, choices, stretches, labels=labels, labels_from="its files")
    if source.kind == "lmdb":
        stretches = lsun.databases(source.listing, root, size=size, held_out=choices.held_out)
        stretches, notes = _of_version(stretches, source), lsun.left_out(source.listing)
        return _layout(name, choices, stretches, classes=None if name in DATASETS else ("all",), notes=notes)
    kept = source.kind == "tars" and not choices.rewrite
    rules = Rules(
        labels=choices.labels,
        class_names=facts(name).class_names if name in DATASETS else (),
        classes=choices.classes,
        held_out=choices.held_out,
        kept=kept,
    )
    images = assign(listed.files, root, rules, partial(files.contents, root, listed.places))
    if kept:
        return _kept(name, listed, choices, images)
    check_name(name, choices)
    read = partial(files.entries, root, listed.places)
    stretches = {
        split: [
            Stretch(kind=source.kind, images=group, count=len(group), read=read, version=listed.version(group))
            for group in (items[start : start + size] for start in range(0, len(items), size))
        ]
        for split, items in images.splits.items()
    }
    return _layout(
        name,
        choices,
        stretches,
        classes=images.class_names,
        labels=images.labels,
        labels_from=images.labels_from,
        notes=images.notes,
    )


def _of_version(stretches: Mapping[str, list[Stretch]], source: Source) -> dict[str, list[Stretch]]:
    version = source.version(sorted(source.files))
    return {split: [replace(stretch, version=version) for stretch in found] for split, found in stretches.items()}


def _kept(name: str, listed: Opened, choices: Choices, images: Assigned) -> Layout:
    """The layout of tars that stay as they are."""
    root, known = listed.source.root, DATASETS.get(name)
    shards = tars.kept(root, listed.scans, images.splits)
    resolution, channels = tars.form_of(listed.scans, root)
    check_name(name, replace(choices, resolution=resolution, channels=channels))
    if choices.resolution not in (None, resolution) or choices.channels not in (None, channels):
        raise DataError(
            f"the images at {root} have {resolution} px and {channels} channels: leave --resolution and --channels "
            "out, or add --rewrite to make new shards of another size"
        )
    return Layout(
        name=name,
        form=Form(resolution=resolution, channels=channels, encoding=default_encoding(resolution)),
        class_names=images.class_names,
        flip=known.flip if known else choices.flip,
        ranges=(),
        labels=images.labels,
        labels_from=images.labels_from,
        notes=images.notes,
        kept=shards,
        root=root,
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
        form=Form(
            resolution=resolution,
            channels=channels,
            encoding=encoding,
            fit=choices.fit,
            filter=choices.filter,
            background=choices.background,
            enlarge=choices.small == "enlarge",
        ),
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
