"""Tars: read once to learn what they hold. Those of an existing WebDataset may be trained on where they lie."""

import bz2
import gzip
import hashlib
import io
import lzma
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from PIL import Image

from data import store
from data.decode import IMAGE_EXTENSIONS, JSON_EXTENSION, LABEL_EXTENSION, key_and_extension, label_text
from data.errors import DataError
from data.manifest import Shard
from data.prepare import colours
from data.prepare.files import File, Item, archive_kind, named, require_distinct
from data.prepare.labels import LONGEST_TABLE, is_sidecar, is_table
from data.prepare.pixels import LARGEST_FILE
from data.store.failures import failure

_LONGEST_LABEL = 2**20
_BLOCK = 2**20
_FORMATS = ("PPM", "PNG", "JPEG", "WEBP")
_CHANNELS_OF_MODE = {"L": 1, "RGB": 3}
_REWRITE = "add --rewrite --resolution N to make new shards of them"


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What one tar holds.

    Attributes:
        path: The tar, relative to the folder of all.
        bytes: Its length.
        sha256: Its hash.
        files: Its files, in their order.
        forms: The (height, width, channels) of its images that occur, each with the first file that has it; 0 channels
            stand for colour spaces other than grey and RGB.
        unreadable: Names of what should be images and are not.
        needs: What some images would need before they could be trained on, each with the first file that needs it.
    """

    path: str
    bytes: int
    sha256: str
    files: tuple[File, ...]
    forms: Mapping[tuple[int, int, int], str]
    unreadable: tuple[str, ...]
    needs: Mapping[str, str]


@contextmanager
def unpacked(root: str, paths: Sequence[str]) -> Iterator[dict[str, str]]:
    """URL of each archive of a source, where compressed tars are read once and lie unpacked as long as this lasts."""
    places = {path: store.join(store.absolute(root), path) for path in paths}
    packed = [path for path in paths if archive_kind(path) == "packed"]
    if not packed:
        yield places
        return
    with tempfile.TemporaryDirectory(prefix="bcm-unpacked-") as temporary:
        for number, path in enumerate(packed):
            plain = Path(temporary) / f"{number}.tar"
            with _fetched(places[path], places[path]) as file:
                _unpack(file, path.lower(), places[path], plain)
            places[path] = str(plain)
        yield places


def _unzstd(file: BinaryIO) -> Any:
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")


_READERS: Mapping[str, Callable[[BinaryIO], Any]] = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "zst": _unzstd}
"""How a compressed file is read, by the end of its name."""


def _unpack(file: BinaryIO, path: str, where: str, to: Path) -> None:
    """Writes what a compressed tar holds."""
    reader = next(reader for end, reader in _READERS.items() if path.endswith(end))
    try:
        with reader(file) as stream, to.open("wb") as out:
            shutil.copyfileobj(stream, out, _BLOCK)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise failure("unpack", where, error) from error
        raise DataError(f"{where} is not a whole compressed tar ({error}): copy it again") from error


def scan(path: str, *, root: str, places: Mapping[str, str], chosen: str | None = None) -> Iterator[Scan]:
    """Reads one tar whole, decoding no pixels: one that is cut, or that holds links, is a DataError.

    Args:
        path: The tar, relative to `root`.
        root: The source, for messages.
        places: URL of each tar.
        chosen: The user's choice of labels.
    """
    where = store.join(root, path)
    with _fetched(places[path], where) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        length = file.tell()
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                files = [_read(file, found, where, chosen) for found in _members(tar, path, length, where)]
                file.seek(tar.offset)
                ended = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
                more = any(block.strip(b"\0") for block in iter(partial(file.read, _BLOCK), b""))
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{where} is not a whole tar file ({error}): copy it again") from error
        if not ended or length % tarfile.BLOCKSIZE:
            raise DataError(
                f"{where} is cut off after {length} bytes, as no whole end mark follows its members: copy it again"
            )
        if more:
            raise DataError(
                f"{where} goes on behind its end mark at byte {tar.offset}: it is damaged there, or several tars were "
                "joined; copy it again, or make it anew"
            )
        require_distinct([file.name for file in files], where)
        looks = _looked_at(file, files)
    yield Scan(path=path, bytes=length, sha256=digest, files=tuple(files), **looks)


@contextmanager
def _fetched(url: str, where: str) -> Iterator[BufferedReader]:
    """The file at `url`, opened; one that is not on this machine is copied to a temporary place first."""
    with tempfile.TemporaryDirectory(prefix="bcm-tar-") as temporary:
        place = Path(store.absolute(url))
        if not store.is_local(url):
            place = Path(temporary) / "shard.tar"
            store.fetch(url, None, None, place)
        try:
            file = place.open("rb")
        except OSError as error:
            raise failure("read", where, error) from error
        with file:
            yield file


def _members(tar: tarfile.TarFile, path: str, length: int, where: str) -> Iterator[File]:
    """The files in a tar of so many bytes."""
    for member in tar:
        tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # they would all be kept
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise DataError(f"{where}: member {member.name!r} is a link or a device, not a file: write the shard again")
        if member.offset_data + member.size > length:
            raise EOFError(f"member {member.name!r} is cut off")
        yield File(name=member.name, size=member.size, archive=path, offset=member.offset_data)


def _read(file: BinaryIO, found: File, where: str, chosen: str | None) -> File:
    """A member with the label it states, or as the table of labels it is; small ones are read on the way."""
    if found.hidden:
        return found
    extension = found.suffix.removeprefix(".")
    file.seek(found.offset)
    if is_table(found, chosen) and found.size <= LONGEST_TABLE:
        return replace(found, text=file.read(found.size))
    if is_sidecar(found, chosen) and found.size <= _LONGEST_LABEL:
        return replace(found, label=label_text(extension, file.read(found.size), f"{where}: {found.name}"))
    return found


def _looked_at(file: BinaryIO, files: Sequence[File]) -> dict[str, Any]:
    """Forms and needs of the images that might be trained on as they lie, and what is none though its name says so."""
    forms: dict[tuple[int, int, int], str] = {}
    needs: dict[str, str] = {}
    unreadable: list[str] = []
    for each in files:
        if each.hidden or each.suffix.removeprefix(".") not in IMAGE_EXTENSIONS or each.size > LARGEST_FILE:
            continue
        file.seek(each.offset)
        try:
            with Image.open(io.BytesIO(file.read(each.size)), formats=_FORMATS) as image:
                form = image.height, image.width, _CHANNELS_OF_MODE.get(image.mode, 0)
                needs = {need: each.name for need in colours.needs(image)} | needs
        except Exception:  # Pillow's readers raise whatever their parsing meets
            unreadable.append(each.name)
        else:
            forms.setdefault(form, each.name)
    return {"forms": forms, "unreadable": tuple(unreadable), "needs": needs}


def kept(root: str, scans: Sequence[Scan], splits: Mapping[str, Sequence[Item]]) -> dict[str, tuple[Shard, ...]]:
    """The shards of each split, if all tars can be trained on as they lie; a DataError says why if they cannot.

    Args:
        root: The folder of all.
        scans: What each tar holds.
        splits: Which images are to be read from them, and their labels.
    """
    wanted: dict[str, dict[str, dict[str, int]]] = {}
    for split, items in splits.items():
        for item in items:
            wanted.setdefault(item.file.archive, {}).setdefault(split, {})[item.file.name] = item.label
    shards: dict[str, list[Shard]] = {split: [] for split in splits}
    for scan in scans:
        where, labels = store.join(root, scan.path), wanted.get(scan.path)
        if labels is None:
            raise DataError(f"{where} holds no images (.png, .jpg, .webp, .ppm): remove it, or check the path")
        if len(labels) > 1:
            raise DataError(f"{where} holds images of the splits {', '.join(labels)}: {_REWRITE}")
        ((split, of_images),) = labels.items()
        images = _images(scan, of_images, where)
        offsets, sizes = [file.offset for file in images], [file.size for file in images]
        shards[split].append(Shard.of(scan.path, scan.bytes, scan.sha256, offsets, sizes))
    return {split: tuple(found) for split, found in shards.items()}


def _images(scan: Scan, labels: Mapping[str, int], where: str) -> list[File]:
    """The images of a tar that a reader of WebDatasets finds, if they are all it holds, with the labels wanted."""
    images: dict[str, File] = {}
    stated: dict[str, dict[str, str]] = {JSON_EXTENSION: {}, LABEL_EXTENSION: {}}
    for file in scan.files:
        key, extension = key_and_extension(file.name, where)
        if extension in IMAGE_EXTENSIONS and key in images:
            raise DataError(f"{where}: {key!r} has two images: only one is read, so remove the other, or {_REWRITE}")
        if extension in IMAGE_EXTENSIONS:
            images[key] = file
        elif extension in stated and file.label is not None:
            stated[extension][key] = file.label
    lost = sorted(labels.keys() ^ {file.name for file in images.values()})
    if lost:
        raise DataError(
            f"{where}: {named(lost, 3)} would be lost or taken for something else, as WebDatasets take the first dot "
            f"of a name for the end of its key, and know .png, .jpg, .webp and .ppm only: {_REWRITE}"
        )
    if scan.unreadable:
        raise DataError(f"{where}: not readable PNG, JPEG, WebP or PPM images, replace them: {named(scan.unreadable)}")
    read = stated[JSON_EXTENSION] | stated[LABEL_EXTENSION]
    for key, file in images.items():
        text, label = read.get(key), labels[file.name]
        if text is not None and not text.isdecimal():
            raise DataError(
                f"{where}: {key}: label {text!r} is not a whole number, as tars that stay as they are need: {_REWRITE}"
            )
        if label != int(text or 0):
            raise DataError(f"{where}: {key}: its label does not come from its own .cls or .json member: {_REWRITE}")
    return list(images.values())


def form_of(scans: Sequence[Scan], root: str) -> tuple[int, int]:
    """Resolution and channels of all images; a set of several is a DataError that names two of them."""
    found = {form: (scan, key) for scan in reversed(scans) for form, key in scan.forms.items()}
    described = [
        f"{store.join(root, scan.path)}: {key} has {height}x{width} pixels and {channels or 'other'} channels"
        for (height, width, channels), (scan, key) in found.items()
    ]
    height, width, channels = next(iter(found))
    for scan in scans:
        for need, key in scan.needs.items():
            raise DataError(
                f"{store.join(root, scan.path)}: {key} and maybe others {need}. Nothing is done with images that are "
                "trained on as they lie: add --rewrite --resolution N to write them into new shards"
            )
    if len(found) > 1 or height != width or not channels:
        raise DataError(
            f"{'; '.join(described[:2])}. Images that are trained on as they lie must be squares of one size, grey or "
            "RGB: add --rewrite --resolution N to crop and resize them into new shards"
        )
    return height, channels
