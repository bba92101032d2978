"""Any existing WebDataset: its tars are read once, and a manifest then describes them where they lie."""

import hashlib
import io
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image

from data import store
from data.decode import IMAGE_EXTENSIONS, JSON_EXTENSION, LABEL_EXTENSION, label_of, members
from data.errors import DataError
from data.prepare import colours
from data.prepare.files import split_of
from data.prepare.layout import Encoded
from data.prepare.pixels import LARGEST_FILE
from data.store.failures import failure

_MOST_CLASSES = 1_000_000
_LONGEST_LABEL = 2**20
_BLOCK = 2**20
_FORMATS = ("PPM", "PNG", "JPEG", "WEBP")
_CHANNELS_OF_MODE = {"L": 1, "RGB": 3}


@dataclass(frozen=True, kw_only=True)
class Member:
    """One image in a tar.

    Attributes:
        key: WebDataset's key.
        offset: Its first byte in the tar.
        size: Its bytes.
        label: Its class; None if it has none.
    """

    key: str
    offset: int
    size: int
    label: int | None


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What one tar holds.

    Attributes:
        path: The tar, relative to the folder of all.
        split: Its split.
        bytes: Its length.
        sha256: Its hash.
        members: Its images.
        forms: The (height, width, channels) that occur, each with the first key that has it; 0 channels stand for
            colour spaces other than grey and RGB.
        needs: What some images would need before they could be trained on, each with the first key that needs it.
    """

    path: str
    split: str
    bytes: int
    sha256: str
    members: tuple[Member, ...]
    forms: Mapping[tuple[int, int, int], str]
    needs: Mapping[str, str]


def entries(root: str, scan: Scan, start: int, stop: int) -> Iterator[Encoded]:
    """Images of one tar from `start` to `stop`, to be cropped, resized and written anew."""
    url = store.join(root, scan.path)
    stem = PurePosixPath(scan.path).stem.replace(".", "_")
    with _fetched(url, scan.bytes, scan.sha256) as file:
        for number, member in enumerate(scan.members[start:stop], start=start):
            file.seek(member.offset)
            yield Encoded(
                key=f"{stem[:80]}-{number:08d}",
                payload=file.read(member.size),
                label=member.label or 0,
                where=f"{url}: {member.key}",
            )


def scan(path: str, root: str) -> Iterator[Scan]:
    """Reads one tar whole, decoding no pixels: a tar that is cut, empty or could run code is a DataError.

    It is of the test split if its name or one of its folders says val or test, else of train.
    """
    url = store.join(root, path)
    with _fetched(url, None, None) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        length = file.tell()
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                needs: dict[str, str] = {}
                found, forms, odd = _images(tar, file, url, needs)
                file.seek(tar.offset)
                ended = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
                more = any(block.strip(b"\0") for block in iter(partial(file.read, _BLOCK), b""))
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{url} is not a whole tar file ({error}): copy it again") from error
        if not ended or length % tarfile.BLOCKSIZE:
            raise DataError(
                f"{url} is cut off after {length} bytes, as no whole end mark follows its members: copy it again"
            )
        if more:
            raise DataError(
                f"{url} goes on behind its end mark at byte {tar.offset}: it is damaged there, or several tars were "
                "joined; copy it again, or make it anew"
            )
        if odd:
            raise DataError(f"{url}: {min(odd)!r} has a label but no image: copy it again, or remove the label")
    place = PurePosixPath(path)
    marks = {split_of(part) for part in (place.name.partition(".")[0], *place.parent.parts)}
    split = "test" if {"val", "test"} & marks else "train"
    yield Scan(path=path, split=split, bytes=length, sha256=digest, members=found, forms=forms, needs=needs)


@contextmanager
def _fetched(url: str, expected_bytes: int | None, sha256: str | None) -> Iterator[BufferedReader]:
    """The file at `url`, opened; one that is not on this machine is copied to a temporary place first."""
    with tempfile.TemporaryDirectory(prefix="bcm-tar-") as temporary:
        place = Path(store.absolute(url))
        if not store.is_local(url):
            place = Path(temporary) / "shard.tar"
            store.fetch(url, expected_bytes, sha256, place)
        try:
            file = place.open("rb")
        except OSError as error:
            raise failure("read", url, error) from error
        with file:
            yield file


def _images(
    tar: tarfile.TarFile, file: BinaryIO, where: str, needs: dict[str, str]
) -> tuple[tuple[Member, ...], dict[tuple[int, int, int], str], set[str]]:
    """The images, their forms, and the keys that have a label but no image; what images need is put into `needs`."""
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, dict[str, int]] = {JSON_EXTENSION: {}, LABEL_EXTENSION: {}}
    forms: dict[tuple[int, int, int], str] = {}
    for key, extension, member in members(tar, where):
        if extension in IMAGE_EXTENSIONS:
            if key in places:
                raise DataError(f"{where}: {key!r} has two images: only one is read, so remove the other")
            places[key] = member.offset_data, member.size
            content = _content(file, member, LARGEST_FILE, where)
            try:
                with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                    form = image.height, image.width, _CHANNELS_OF_MODE.get(image.mode, 0)
                    for need in colours.needs(image):
                        needs.setdefault(need, key)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise DataError(
                    f"{where}: {key}: not a readable PNG, JPEG, WebP or PPM image: replace or remove it"
                ) from error
            forms.setdefault(form, key)
        elif extension in labels:
            content = _content(file, member, _LONGEST_LABEL, where)
            label = label_of(extension, content, _MOST_CLASSES, f"{where}: {key}")
            labels[extension] |= {} if label is None else {key: label}
    if not places:
        raise DataError(f"{where} holds no images (.png, .jpg, .webp, .ppm): remove it, or check the path")
    known = labels[JSON_EXTENSION] | labels[LABEL_EXTENSION]
    found = (Member(key=key, offset=at, size=size, label=known.get(key)) for key, (at, size) in places.items())
    return tuple(found), forms, known.keys() - places.keys()


def _content(file: BinaryIO, member: tarfile.TarInfo, most: int, where: str) -> bytes:
    if member.size > most:
        raise DataError(f"{where}: member {member.name!r} has {member.size} bytes; at most {most} are read")
    file.seek(member.offset_data)
    payload = file.read(member.size)
    if len(payload) < member.size:
        raise EOFError(f"member {member.name!r} is cut off")
    return payload


def form_of(scans: list[Scan], root: str) -> tuple[int, int]:
    """Resolution and channels of all images; a set of several is a DataError that names two of them."""
    if not scans:
        raise DataError(f"there are no tar files at {root}: check the path")
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


def classes_of(scans: list[Scan], root: str) -> tuple[str, ...]:
    """Names of the classes: the labels from 0 to the greatest, or one class if there are no labels at all."""
    labels = np.array([-1 if member.label is None else member.label for scan in scans for member in scan.members])
    if (labels < 0).all():
        return ("all",)
    if (labels < 0).any():
        scan, member = next((s, m) for s in scans for m in s.members if m.label is None)
        raise DataError(f"{store.join(root, scan.path)}: {member.key} has no label, but others have: label all or none")
    return tuple(str(label) for label in range(int(labels.max()) + 1))
