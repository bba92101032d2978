"""From a name and a source to a plan: which kind of source it is, and what is to be written from it."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from data import store
from data.catalog import DATASETS, facts
from data.errors import DataError
from data.prepare import cifar10, digits, files, imagenet64, lsun, tars
from data.prepare.layout import Part, Plan, tasks_of
from data.prepare.pack import SAMPLES_PER_SHARD, Form, default_encoding
from data.prepare.write import Runner

Parts = Mapping[str, list[tuple[Part, int]]]

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the user may decide. None takes what the catalog says, or what is usual.

    Attributes:
        resolution: Height and width; needed for a set that the catalog does not know.
        channels: 1 (grey) or 3 (RGB); usually 3.
        flip: Whether mirrored images may be trained on; usually not.
        encoding: "raw", "png" or "webp".
        held_out: Size of the test split where the source marks none; usually a tenth, at most 1,000.
        samples_per_shard: Samples in each shard but the last of each part of the source.
        rewrite: Of an existing WebDataset, write new shards rather than describe those there are.
    """

    resolution: int | None = None
    channels: int | None = None
    flip: bool | None = None
    encoding: str | None = None
    held_out: int | None = None
    samples_per_shard: int = SAMPLES_PER_SHARD
    rewrite: bool = False

    def __post_init__(self) -> None:
        """Checks what no later step would."""
        if self.samples_per_shard < 1:
            raise DataError(f"samples per shard is {self.samples_per_shard}: give at least 1")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where images come from.

    Attributes:
        root: URL of the folder or zip file.
        listing: Bytes of each file in it, by path.
        kind: "npz", "lmdb", "tars", "zip" or "folder".
    """

    root: str
    listing: Mapping[str, int]
    kind: str


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
            _explain_unknown(name)
        if not _NAME.fullmatch(name):
            raise DataError(f"the name {name!r} must be of a-z, 0-9, '.', '_' and '-'")
        return
    for option, fact in (("resolution", known.resolution), ("channels", known.channels), ("flip", known.flip)):
        chosen = getattr(choices, option)
        if chosen not in (None, fact):
            raise DataError(f"{name} has {option} {fact}, not {chosen}: leave that out, or choose a name of your own")


def _explain_unknown(name: str) -> None:
    try:
        facts(name)
    except DataError as error:
        raise DataError(f"{error}. For images of your own, under a name of your own, give their --resolution") from None


def look_at(name: str, source: str) -> Source:
    """What kind of source that is, from its listing alone."""
    listing = store.walk(source)
    if listing.keys() == {""}:
        if source.lower().endswith(".zip"):
            return Source(root=source, listing=files.zip_listing(source), kind="zip")
        root, _, file = source.rpartition("/")
        source, listing = root or ".", {file: listing[""]}
    if not listing:
        raise DataError(f"there are no files at {source}: check the path")
    if name == "imagenet64" and any(map(imagenet64.is_batch, listing)):
        return Source(root=source, listing=listing, kind="npz")
    if any(map(lsun.is_database, listing)):
        return Source(root=source, listing=listing, kind="lmdb")
    if any(path.lower().endswith(".tar") for path in listing):
        return Source(root=source, listing=listing, kind="tars")
    return Source(root=source, listing=listing, kind="folder")


@contextmanager
def planned(name: str, source: str | None, choices: Choices, run: Runner) -> Iterator[Plan]:
    """The plan for a data set, valid as long as the block lasts."""
    check_name(name, choices, own_size=source is not None)
    if name == "digits":
        if source is not None:
            raise DataError(
                f"digits comes with scikit-learn and takes no source, but {source!r} was given: leave it out"
            )
        counts = facts(name).splits
        yield _plan(name, choices, {split: [(digits.DigitsPart(split=split), counts[split])] for split in counts})
    elif name == "cifar10":
        if source is None:
            raise DataError(
                "cifar10 needs a source: the path or URL of cifar-10-python.tar.gz or its unpacked folder, "
                f"for example {cifar10.DOWNLOAD_URL}"
            )
        with cifar10.unpacked(source) as folder:
            yield _plan(name, choices, cifar10.parts(folder), local=True)
    elif source is None:
        known = f": {facts(name).source_note}" if name in DATASETS else ""
        raise DataError(f"{name} needs a source, the path or URL of its images{known}")
    else:
        yield plan_of(name, look_at(name, source), choices, run)


def plan_of(name: str, source: Source, choices: Choices, run: Runner) -> Plan:
    """The plan for the images of a source; those of tars are found by reading these once."""
    check_name(name, choices)
    local = store.is_local(source.root)
    labelled = name not in DATASETS or len(facts(name).class_names) > 1
    size, held_out = choices.samples_per_shard, choices.held_out
    if source.kind == "npz":
        parts, notes = imagenet64.batches(source.listing, source.root)
        return _plan(name, choices, parts, local=local, notes=notes)
    if source.kind == "lmdb":
        parts = lsun.databases(source.listing, source.root, size=size, held_out=held_out)
        return _plan(name, choices, parts, classes=None if name in DATASETS else ("all",), local=True)
    if source.kind == "tars":
        scans = scanned(source, run)
        found: dict[str, list[tuple[Part, int]]] = {}
        for scan in scans:
            found.setdefault(scan.split, []).append((tars.TarPart(root=source.root, scan=scan), len(scan.members)))
        return _plan(name, choices, found, classes=tars.classes_of(scans, source.root), local=local)
    kind = files.ZipPart if source.kind == "zip" else files.FolderPart
    images = files.sort_out(source.listing, source.root, labelled=labelled, held_out=held_out)
    parts = {split: files.file_parts(kind, source.root, items, size) for split, items in images.splits.items()}
    return _plan(
        name, choices, parts, classes=images.class_names if labelled else None, local=local, notes=images.notes
    )


def scanned(source: Source, run: Runner) -> list[tars.Scan]:
    """What each tar of a source holds, in the order of their paths."""
    paths = sorted(path for path in source.listing if path.lower().endswith(".tar"))
    return sorted(run(partial(tars.scan, root=source.root), paths), key=lambda scan: scan.path)


def _plan(
    name: str,
    choices: Choices,
    parts: Parts,
    *,
    classes: tuple[str, ...] | None = None,
    local: bool = False,
    notes: tuple[str, ...] = (),
) -> Plan:
    """The plan; where `classes` is None they are those of the catalog."""
    known = DATASETS.get(name)
    resolution = known.resolution if known else choices.resolution or 0
    channels = known.channels if known else choices.channels or 3
    encoding = choices.encoding or default_encoding(resolution)
    names = facts(name).class_names if classes is None else classes
    plan = Plan(
        name=name,
        form=Form(resolution=resolution, channels=channels, encoding=encoding),
        class_names=names,
        flip=known.flip if known else bool(choices.flip),
        tasks=tuple(task for split in parts for task in tasks_of(split, parts[split], choices.samples_per_shard)),
        local=local,
        notes=notes,
    )
    if known is None or plan.counts == dict(known.splits):
        return plan
    published = ", ".join(f"{count:,} {split}" for split, count in known.splits.items())
    found = ", ".join(f"{count:,} {split}" for split, count in plan.counts.items())
    return replace(plan, notes=(*notes, f"the source holds {found} images, but {name} has {published}"))
