"""The files of a source, in a folder at any URL or in archives: listed by name and size, and read."""

import os
import re
import tarfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import BinaryIO

from data import store
from data.errors import DataError
from data.prepare.layout import Encoded
from data.prepare.pixels import LARGEST_FILE
from data.prepare.remote import open_seekable
from data.store.failures import failure

_READERS = 16
_READ_AHEAD = 64
_ARCHIVE = re.compile(
    r"(?P<stem>.*)\.(?:(?P<zip>zip)|(?P<tar>tar)|(?P<packed>tar\.(?:gz|bz2|xz|zst)|t(?:gz|bz2|xz|zst)))"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """One file of a source.

    Attributes:
        name: Its path in the folder or archive, as spelled there.
        size: Its bytes.
        archive: Path of the archive that holds it; "" for a file of the folder itself.
        offset: First byte of its content, in a tar.
        label: The label it states, if it is a small file of a tar that states one.
        text: Its content, if it is a table of labels in a tar.
    """

    name: str
    size: int
    archive: str = ""
    offset: int = -1
    label: str | None = field(default=None, repr=False, compare=False)
    text: bytes | None = field(default=None, repr=False, compare=False)

    @property
    def path(self) -> tuple[str, ...]:
        """Its folders and its own name: slashes of both kinds part them, and each character has one spelling."""
        name = unicodedata.normalize("NFC", self.name.replace("\\", "/"))
        return tuple(part for part in name.split("/") if part not in ("", ".")) or ("",)

    @property
    def suffix(self) -> str:
        """The end of its name from the last dot, in lower case; "" if there is none."""
        stem, dot, end = self.name.replace("\\", "/").rpartition("/")[2].rpartition(".")
        return dot + end.lower() if stem else ""

    @property
    def hidden(self) -> bool:
        """Whether its name, or that of a folder, begins with a dot, or it is of those that macOS adds to archives."""
        name = "/" + self.name.replace("\\", "/")
        marked = "/." in name or "/__MACOSX" in name
        return marked and any(part.startswith((".", "__MACOSX")) for part in self.path if part != "..")

    def place(self, root: str) -> str:
        """Where it is, for messages."""
        return "/".join(
            part.strip("/") if at else part for at, part in enumerate((root, self.archive, self.name)) if part
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image of a set.

    Attributes:
        file: Where it is.
        label: Its class.
        number: Its place among the files of its split.
    """

    file: File
    label: int
    number: int


def archive_kind(path: str) -> str | None:
    """What a file's name says it is: "zip", "tar", "packed" (a compressed tar) or no archive."""
    match = _ARCHIVE.fullmatch(path.lower())
    return match and match.lastgroup


def is_archive(path: str) -> bool:
    """Whether a file of a source is an archive that is read."""
    return archive_kind(path) is not None and not File(name=path, size=0).hidden


def archive_stem(path: str) -> str:
    """The name of an archive without its folders and what says that it is one."""
    name = path.rpartition("/")[2]
    match = _ARCHIVE.fullmatch(name.lower())
    return name[: len(match["stem"])] if match else name


def problem_of(size: int) -> str:
    """Why an image file of so many bytes is not read; "" if it is."""
    return "" if 0 < size <= LARGEST_FILE else f"has {size} bytes, not 1 to {LARGEST_FILE}"


def listed(source: str) -> dict[str, store.Version]:
    """What each file of a source is now, by its path, sorted; {"": it} for a file itself. Links are followed."""
    if not store.is_local(source) or not os.path.isdir(root := store.absolute(source)):
        return store.versions(source)
    found: dict[str, store.Version] = {}
    broken: list[str] = []
    above = {root: frozenset({os.path.realpath(root)})}
    for folder, folders, names in os.walk(root, followlinks=True, onerror=partial(_unlisted, root)):
        for name in names:
            path = os.path.join(folder, name)
            try:
                status = os.stat(path)
            except OSError:
                broken.append(path)
            else:
                found[os.path.relpath(path, root)] = store.Version(length=status.st_size, mark=str(status.st_mtime))
        for name in folders:
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            if real in above[folder]:
                raise DataError(f"{path} is a link to a folder that it lies in: remove the link")
            above[path] = above[folder] | {real}
    if broken:
        raise DataError(f"{named(broken)} lead nowhere: repair or remove these links")
    return dict(sorted(found.items()))


def _unlisted(root: str, error: OSError) -> None:
    raise failure("list", error.filename or root, error) from error


def named(names: Sequence[str], most: int = 10) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def open_zip(file: BinaryIO, where: str) -> zipfile.ZipFile:
    """The zip file in an open file; anything else is a DataError."""
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{where} is not a whole zip file ({error}): download it again") from error


def zip_members(url: str) -> list[zipfile.ZipInfo]:
    """What a zip file says of each file in it, sorted by name."""
    with open_seekable(url) as file, open_zip(file, url) as opened:
        members = sorted(opened.infolist(), key=lambda member: member.filename)
    found = [member for member in members if not member.filename.endswith(("/", "\\"))]
    require_distinct([member.filename for member in found], url)
    return found


def zip_files(url: str, archive: str) -> list[File]:
    """The files in a zip file."""
    return [File(name=each.filename, size=each.file_size, archive=archive) for each in zip_members(url)]


def require_distinct(names: Sequence[str], where: str) -> None:
    """Archives may hold two files of one name, of which most readers see one: that is a DataError."""
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    if twice:
        raise DataError(
            f"{where} holds two files called {named(twice, 3)}: one would be lost, so make the archive anew"
        )


def contents(root: str, places: Mapping[str, str], files: Sequence[File]) -> Iterator[bytes]:
    """The bytes of some files of a source, one after the other; one that cannot be read is a DataError."""
    for file, (payload, problem) in zip(files, _contents(root, places, files), strict=True):
        if problem:
            raise DataError(f"{file.place(root)} {problem}")
        yield payload


def _contents(root: str, places: Mapping[str, str], files: Sequence[File]) -> Iterator[tuple[bytes, str]]:
    """The bytes of some files of a source, and why they cannot be read or "".

    What they hold that was not given yet is at most 64 MiB together, or a single file.

    Args:
        root: The source, for messages.
        places: URL of each archive.
        files: The files. Those of a server are read by several threads, as each takes a moment to answer.
    """
    here = all(map(store.is_local, places.values() if places else [root]))
    zips: dict[str, zipfile.ZipFile] = {}
    versions: dict[str, store.Version] = {}

    folder = Path(store.absolute(root)) if store.is_local(root) else None

    def read(file: File) -> tuple[bytes, str]:
        if problem := problem_of(file.size):
            return b"", problem
        if file.archive in zips:
            return _member(zips[file.archive], file.name)
        if file.archive in versions:
            return _tar_member(root, places[file.archive], versions[file.archive], file), ""
        if folder is None:
            return store.read_bytes(store.join(root, file.name)), ""
        return _local(folder / file.name, 0, file.size), ""

    with ExitStack() as stack, ThreadPoolExecutor(max_workers=_READERS) as pool:
        first = 0
        while first < len(files):
            held = accumulate(file.size for file in files[first : first + (1 if here else _READ_AHEAD)])
            group = files[first : first + max(1, sum(size <= LARGEST_FILE for size in held))]
            first += len(group)
            for archive in {file.archive for file in group} & places.keys() - zips.keys() - versions.keys():
                url = places[archive]
                if archive_kind(url) == "zip":
                    opened = stack.enter_context(open_seekable(url))
                    zips[archive] = stack.enter_context(open_zip(opened, url))
                else:
                    versions[archive] = store.version(url)
            yield from map(read, group) if here else pool.map(read, group)


def _local(path: Path, start: int, end: int) -> bytes:
    """Bytes `start` to `end` (not included) of a file of this machine, of which it may have become too short."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)
    except OSError as error:
        raise failure("read", str(path), error) from error


def _tar_member(root: str, url: str, known: store.Version, file: File) -> bytes:
    """A file of the tar at `url`. The header just before must still be that of a file of this size."""
    start, end = file.offset - tarfile.BLOCKSIZE, file.offset + file.size
    if store.is_local(url):
        payload = _local(Path(url), start, end)
    else:
        edges = [*range(start, end, store.RANGE_BYTES), end]
        payload = b"".join(store.read_range(url, begin, stop, known) for begin, stop in pairwise(edges))
    try:
        header = tarfile.TarInfo.frombuf(payload[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        header = None
    if header is None or not header.isreg() or header.size != file.size or len(payload) != end - start:
        raise DataError(f"{file.place(root)} has changed since it was listed: run the command again")
    return payload[tarfile.BLOCKSIZE :]


def _member(archive: zipfile.ZipFile, name: str) -> tuple[bytes, str]:
    """A file of a zip file, its checksum compared, and why it cannot be read or ""."""
    try:
        return archive.read(name), ""
    except DataError:
        raise
    except Exception as error:  # zlib.error and lzma.LZMAError have no base but Exception
        return b"", f"cannot be read ({error}): download the zip file again"


def entries(root: str, places: Mapping[str, str], items: Sequence[Item], start: int, stop: int) -> Iterator[Encoded]:
    """Images of a source from `start` to `stop`."""
    chosen = items[start:stop]
    answers = _contents(root, places, [item.file for item in chosen])
    for item, (payload, problem) in zip(chosen, answers, strict=True):
        where = item.file.place(root)
        yield Encoded(key=f"{item.number:08d}", payload=payload, label=item.label, where=where, problem=problem)
