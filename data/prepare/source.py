"""What kind of source a path is, and which files it holds, in folders and archives."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath

from data import store
from data.errors import DataError
from data.manifest import MANIFEST_NAME
from data.prepare import fashion_mnist, files, imagenet64, lsun, tars
from data.prepare.assign import is_image
from data.prepare.files import File, Item, archive_kind
from data.prepare.write import Runner


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where images come from.

    Attributes:
        root: URL of the folder or zip file.
        listing: Bytes of each file in it, by path.
        kind: "npz", "idx", "lmdb", "zip" (one zip file), "tars" (plain ones alone), "archives" (any others) or
            "folder".
        marks: For each file what changes when it is replaced: its ETag, the time of its last change, or its checksum.
    """

    root: str
    listing: Mapping[str, int]
    kind: str
    marks: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, int]:
        """Those that can decide what is in a set: of an lmdb, npz batches or idx files not what else lies there."""
        names = {"lmdb": (lsun.DATABASE,), "npz": (".npz",), "idx": tuple(fashion_mnist.SHA256)}.get(self.kind, ("",))
        # The manifest of tars that stay where they are may lie beside them.
        skipped = {MANIFEST_NAME} if self.kind == "tars" else set[str]()
        return {
            path: size
            for path, size in self.listing.items()
            if any(name in path.lower() for name in names)
            and path not in skipped
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


def look_at(name: str, source: str) -> Source:
    """What kind of source that is, from its listing alone."""
    versions = files.listed(source)
    listing, marks = ({path: getattr(each, part) for path, each in versions.items()} for part in ("length", "mark"))
    if listing.keys() == {""}:
        if archive_kind(source) == "zip":
            members = files.zip_members(source)
            sizes = {each.filename: each.file_size for each in members}
            checksums = {each.filename: f"{each.CRC:08x}" for each in members}
            return Source(root=source, listing=sizes, kind="zip", marks=checksums)
        root, _, file = source.rpartition("/")
        source, listing, marks = root or source[:1].strip("/") or ".", {file: listing[""]}, {file: marks[""]}
    if not listing:
        raise DataError(f"there are no files at {source}: check the path")
    names = {PurePosixPath(path).name for path in listing}
    if name == "imagenet64" and any(map(imagenet64.BATCH.fullmatch, names)):
        kind = "npz"
    elif name == "fashion-mnist" and names & fashion_mnist.SHA256.keys():
        kind = "idx"
    elif lsun.DATABASE in names:
        kind = "lmdb"
    else:
        kind = _kind(listing, source)
    return Source(root=source, listing=listing, kind=kind, marks=marks)


def _kind(listing: Mapping[str, int], root: str) -> str:
    """Which archives a folder holds, if any; images beside them are a DataError."""
    archives = [path for path in listing if files.is_archive(path)]
    if not archives:
        return "folder"
    images = [path for path in listing if is_image(File(name=path, size=0))]
    if images:
        raise DataError(
            f"{root} holds {len(images):,} images (such as {images[0]}) and {len(archives):,} archives (such as "
            f"{archives[0]}), and may hold the same images twice: move the one or the other elsewhere"
        )
    return "tars" if {archive_kind(path) for path in archives} == {"tar"} else "archives"


def check_apart(source: str, to: str) -> None:
    """Whether shards are written outside of the source, where another run would take them for images."""
    root, place = (
        os.path.realpath(store.absolute(url)) if store.is_local(url) else url.rstrip("/") for url in (source, to)
    )
    if f"{place}/".startswith(f"{root.rstrip('/')}/"):
        raise DataError(f"{to} lies in the source {source}, of which it would become a part: write elsewhere")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A source that can be read from.

    Attributes:
        source: The source.
        files: Its files, those in its archives among them.
        scans: What each of its tars holds.
        places: URL of each archive by its path; of a zip file that is the source itself by "".
    """

    source: Source
    files: tuple[File, ...] = ()
    scans: tuple[tars.Scan, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)

    def version(self, items: Iterable[Item]) -> str:
        """Differs when one of the images may have been replaced."""
        by_archive = self.source.kind in ("tars", "archives")
        return self.source.version(item.file.archive if by_archive else item.file.name for item in items)


@contextmanager
def opened(source: Source, labels: str | None, run: Runner) -> Iterator[Opened]:
    """Lists the files of a source; tars are read for that; compressed ones lie unpacked as long as this lasts.

    `labels` is the user's choice of labels, `run` says where tars are read.
    """
    root, listing = source.root, source.listing
    if source.kind in ("npz", "idx", "lmdb"):
        yield Opened(source=source)
        return
    if source.kind == "zip":
        found = [File(name=path, size=size) for path, size in listing.items()]
        yield Opened(source=source, files=tuple(found), places={"": root})
        return
    archives = [path for path in listing if files.is_archive(path)] if source.kind != "folder" else []
    with tars.unpacked(root, archives) as places:
        paths = [path for path in archives if archive_kind(path) != "zip"]
        scan = partial(tars.scan, root=root, places=places, chosen=labels)
        scans = {scan.path: scan for scan in run(scan, paths)}
        found = [File(name=path, size=size) for path, size in listing.items() if path not in archives]
        for path in archives:
            found += scans[path].files if path in scans else files.zip_files(places[path], path)
        ordered = tuple(scans[path] for path in paths)
        yield Opened(source=source, files=tuple(found), scans=ordered, places=places)
