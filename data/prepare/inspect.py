"""From a name and a source to a layout: which kind of source it is, and what is to be written from it."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Literal

from data import store
from data.catalog import DATASETS, facts
from data.errors import DataError
from data.prepare import cifar10, digits, files, imagenet64, lsun, tars
from data.prepare.layout import Layout, Stretch, shard_ranges
from data.prepare.pack import SAMPLES_PER_SHARD, Filter, Fit, Form, default_encoding
from data.prepare.remote import open_seekable
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


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where images come from.

    Attributes:
        root: URL of the folder or zip file.
        listing: Bytes of each file in it, by path.
        kind: "npz", "lmdb", "tars", "zip" or "folder".
        marks: For each file what changes when it is replaced: its ETag, the time of its last change, or its checksum.
    """

    root: str
    listing: Mapping[str, int]
    kind: str
    marks: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, int]:
        """Those that can decide what is in a set: of tars, an lmdb or npz batches not what else lies there."""
        names = {"tars": (".tar", ".tgz"), "lmdb": (lsun.DATABASE,), "npz": (".npz",)}.get(self.kind, ("",))
        return {
            path: size
            for path, size in self.listing.items()
            if any(name in path.lower() for name in names)
            and not any(part.startswith(".") for part in PurePosixPath(path).parts)
        }

    def version(self, paths: Iterable[str]) -> str:
        """Differs when one of these files was replaced."""
        return digest(self.marks.get(path, "") for path in paths)


def digest(texts: Iterable[str]) -> str:
    """One hash of several texts, which may hold names that are not UTF-8."""
    whole = hashlib.sha256()
    for text in texts:
        whole.update(text.encode("utf-8", "surrogateescape") + b"\0")
    return whole.hexdigest()


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
    versions = store.versions(source)
    listing, marks = ({path: getattr(each, part) for path, each in versions.items()} for part in ("length", "mark"))
    if listing.keys() == {""}:
        if source.lower().endswith(".zip"):
            with open_seekable(source) as file, files.open_zip(file, source) as archive:
                members = sorted(archive.infolist(), key=lambda member: member.filename)
            sizes = {each.filename: each.file_size for each in members}
            checksums = {each.filename: f"{each.CRC:08x}" for each in members}
            return Source(root=source, listing=sizes, kind="zip", marks=checksums)
        root, _, file = source.rpartition("/")
        source, listing, marks = root or ".", {file: listing[""]}, {file: marks[""]}
    if not listing:
        raise DataError(f"there are no files at {source}: check the path")
    names = {PurePosixPath(path).name for path in listing}
    if name == "imagenet64" and any(map(imagenet64.BATCH.fullmatch, names)):
        kind = "npz"
    elif lsun.DATABASE in names:
        kind = "lmdb"
    else:
        kind = "tars" if any(path.lower().endswith(".tar") for path in listing) else "folder"
    return Source(root=source, listing=listing, kind=kind, marks=marks)


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
        yield _layout(name, choices, stretches)
    elif name == "cifar10":
        if source is None:
            raise DataError(
                "cifar10 needs a source: the path or URL of cifar-10-python.tar.gz or its unpacked folder, "
                f"for example {cifar10.DOWNLOAD_URL}"
            )
        with cifar10.unpacked(source) as folder:
            yield _layout(name, choices, cifar10.stretches(folder))
    elif source is None:
        known = f": {facts(name).source_note}" if name in DATASETS else ""
        raise DataError(f"{name} needs a source, the path or URL of its images{known}")
    else:
        yield layout_of(name, look_at(name, source), choices, run)


def layout_of(name: str, source: Source, choices: Choices, run: Runner) -> Layout:
    """The layout of the images of a source; those of tars are found by reading these once."""
    check_name(name, choices)
    root, size, held_out = source.root, choices.samples_per_shard, choices.held_out
    labelled = name not in DATASETS or len(facts(name).class_names) > 1
    stretches: dict[str, list[Stretch]] = {}
    if source.kind == "npz":
        stretches, notes = imagenet64.batches(source.listing, root)
        return _layout(name, choices, _of_version(stretches, source), notes=notes)
    if source.kind == "lmdb":
        stretches = _of_version(lsun.databases(source.listing, root, size=size, held_out=held_out), source)
        return _layout(name, choices, stretches, classes=None if name in DATASETS else ("all",))
    if source.kind == "tars":
        scans = scanned(source, run)
        for scan in scans:
            stretch = Stretch(kind="tar", images=scan, count=len(scan.members), read=partial(tars.entries, root))
            stretches.setdefault(scan.split, []).append(stretch)
        return _layout(name, choices, stretches, classes=tars.classes_of(scans, root))
    splits, classes, notes = files.sort_out(source.listing, root, labelled=labelled, held_out=held_out)
    read = partial(files.zip_entries if source.kind == "zip" else files.folder_entries, root)
    for split, items in splits.items():
        groups = [items[start : start + size] for start in range(0, len(items), size)]
        stretches[split] = [
            Stretch(
                kind=source.kind,
                images=group,
                count=len(group),
                read=read,
                version=source.version(item.name for item in group),
            )
            for group in groups
        ]
    return _layout(name, choices, stretches, classes=classes if labelled else None, notes=notes)


def _of_version(stretches: Mapping[str, list[Stretch]], source: Source) -> dict[str, list[Stretch]]:
    version = source.version(sorted(source.files))
    return {split: [replace(stretch, version=version) for stretch in found] for split, found in stretches.items()}


def scanned(source: Source, run: Runner) -> list[tars.Scan]:
    """What each tar of a source holds, in the order of their paths."""
    paths = sorted(path for path in source.listing if path.lower().endswith(".tar"))
    return sorted(run(partial(tars.scan, root=source.root), paths), key=lambda scan: scan.path)


def _layout(
    name: str,
    choices: Choices,
    stretches: Mapping[str, list[Stretch]],
    *,
    classes: tuple[str, ...] | None = None,
    notes: tuple[str, ...] = (),
) -> Layout:
    """The layout; where `classes` is None they are those of the catalog."""
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
        notes=notes,
    )
    if known is None or layout.counts == dict(known.splits):
        return layout
    published = ", ".join(f"{count:,} {split}" for split, count in known.splits.items())
    found = ", ".join(f"{count:,} {split}" for split, count in layout.counts.items())
    return replace(layout, notes=(*notes, f"the source holds {found} images, but {name} has {published}"))
