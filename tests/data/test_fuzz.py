"""Thousands of damaged tars and manifests: each is a DataError or changes nothing, and none does anything else."""

import hashlib
import io
import os
import random
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import write_split
from mutations import changed_header, changed_value, mutated
from numpy.typing import NDArray
from PIL import Image

from data import store
from data.decode import IMAGE_EXTENSIONS, decode_shard, key_and_extension
from data.errors import DataError
from data.manifest import MANIFEST_NAME, Manifest, load_manifest, write_manifest
from data.prepare.tars import classes_of, scan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SEED = 20261122
TARS, SCANS, MANIFESTS = 1400, 1000, 2800
"""Damaged files of each kind; tars and scans once for each encoding of the images, so 10,000 together."""
MEMORY = 512 * 2**20
"""Bytes of address space by which this process may grow while a test runs."""
SECONDS_A_CASE = 5.0

FORBIDDEN = ("os.exec", "os.fork", "os.posix_spawn", "os.system", "pickle.find_class", "subprocess.Popen")
FORBIDDEN += ("ctypes.dlopen", "socket.connect")


class Watch:
    """Notes what Python code should never do on account of what it reads."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.beneath: str | None = None
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.beneath is None:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r}")
        elif event in ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"):
            writes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not str(arguments[0]).startswith((self.beneath, "bcm-tar-", "shard.tar")):
                self.seen.append(f"{event} {arguments!r}")


WATCH = Watch()
"""A hook cannot be taken away again, so there is one, which sleeps between the tests."""


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """No code is run, nothing is written but beneath `folder`, and the memory stays bounded."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    kept = tempfile.tempdir, resource.getrlimit(resource.RLIMIT_AS)
    tempfile.tempdir = WATCH.beneath = str(folder)
    WATCH.seen.clear()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, kept[1][1]))
    try:
        yield
    finally:
        WATCH.beneath, tempfile.tempdir = None, kept[0]
        resource.setrlimit(resource.RLIMIT_AS, kept[1])
    assert WATCH.seen == []


@contextmanager
def case(kind: str, number: int) -> Iterator[random.Random]:
    """A source of random numbers for one case, which is named where it fails, and which may not take long."""
    seed, began = f"{SEED} {kind} {number}", time.monotonic()
    try:
        yield random.Random(seed)
        assert time.monotonic() - began < SECONDS_A_CASE
    except Exception as error:
        error.add_note(f"in case {seed!r}")
        raise


# Each takes the bytes of a file and a source of random numbers, and returns other bytes.


Content = list[tuple[bytes, int]]
"""Pixels and label of each image, in their order."""


def content(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Content:
    return [(image.tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True)]


@dataclass(frozen=True)
class Whole:
    """An undamaged set."""

    encoding: str
    manifest: Manifest
    raw: dict[str, bytes]
    content: Content


def loaded(folder: Path, manifest: Manifest, split: str = "train") -> Content:
    """What a split gives, in the way that the cache takes: a checked copy of each shard, decoded."""
    found: Content = []
    for shard in manifest.split(split).shards:
        source, copy = store.join(manifest.place(str(folder)), shard.path), folder / "copy"
        store.fetch(source, shard.bytes, shard.sha256, copy, durable=False)
        found += content(*decode_shard(copy, source, shard, manifest))
    return found


def tiny(folder: Path, samples: list[Any], encoding: str) -> Whole:
    split = write_split(str(folder), "train", samples, samples_per_shard=3, encoding=encoding)
    facts = {"name": "tiny", "resolution": 4, "channels": 3, "class_names": ("a", "b", "c", "d"), "flip": True}
    manifest = Manifest(**facts, splits={"train": split})
    write_manifest(str(folder), manifest)
    raw = {shard.path: (folder / shard.path).read_bytes() for shard in split.shards}
    Image.init()  # it would load its plug-ins at the first strange image
    found = loaded(folder, manifest)
    assert [pixels for pixels, _ in found] == [sample.image.transpose(2, 0, 1).tobytes() for sample in samples]
    return Whole(encoding, manifest, raw, found)


@pytest.fixture(params=["raw", "png", "webp"])
def whole(request: pytest.FixtureRequest, tmp_path: Path, random_samples) -> Whole:
    """A set of two shards, three images of 4x4 pixels in each."""
    return tiny(tmp_path, random_samples(6, resolution=4), request.param)


def listed(raw: bytes) -> list[tuple[str, str, int, int]]:
    """Key, extension, first byte and length of each file in a tar, by the standard library."""
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        return [
            (*key_and_extension(member.name, ""), member.offset_data, member.size) for member in tar if member.isreg()
        ]


def images_of(raw: bytes) -> list[tuple[str, int, int]]:
    return [(key, at, size) for key, extension, at, size in listed(raw) if extension in IMAGE_EXTENSIONS]


def slowly(raw: bytes) -> Content:
    """The images and labels that a tar holds, by the standard library and Pillow."""
    labels = {key: int(raw[at : at + size]) for key, kind, at, size in listed(raw) if kind == "cls"}
    pixels = {key: np.asarray(Image.open(io.BytesIO(raw[at : at + size]))) for key, at, size in images_of(raw)}
    return [(image.transpose(2, 0, 1).tobytes(), labels[key]) for key, image in pixels.items()]


def test_damaged_tars(whole: Whole, tmp_path: Path) -> None:
    first = whole.manifest.splits["train"].shards[0]
    survived = refused = 0
    with watched(tmp_path):
        for number in range(TARS):
            with case(f"{whole.encoding} tar", number) as chance:
                raw = mutated(whole.raw[first.path], chance, changed_header)
                (tmp_path / first.path).write_bytes(raw)
                try:
                    assert loaded(tmp_path, whole.manifest) == whole.content
                except DataError as error:
                    assert raw != whole.raw[first.path]
                    assert first.path in str(error)
                # The same, if whoever wrote the manifest saw the damaged bytes.
                stated = replace(first, bytes=max(len(raw), first.bytes), sha256=hashlib.sha256(raw).hexdigest())
                try:
                    found = content(*decode_shard(tmp_path / first.path, "the shard", stated, whole.manifest))
                except DataError as error:
                    assert "the shard" in str(error)
                    refused += 1
                else:
                    assert found == slowly(raw)
                    assert len(found) == 3
                    survived += 1
    print(f"{refused} refused, {survived} read as they are")
    assert min(refused, survived) > TARS // 20


def test_damaged_tars_without_a_manifest(whole: Whole, tmp_path: Path) -> None:
    path = whole.manifest.splits["train"].shards[0].path
    survived = refused = 0
    with watched(tmp_path):
        for number in range(SCANS):
            with case(f"{whole.encoding} scan", number) as chance:
                forged = bool(number % 2)
                raw = mutated(whole.raw[path], chance, changed_header if forged else None)
                (tmp_path / path).write_bytes(raw)
                try:
                    (found,) = scan(path, str(tmp_path))
                    classes_of([found], str(tmp_path))
                except DataError as error:
                    assert path in str(error)
                    refused += 1
                else:
                    assert [(member.key, member.offset, member.size) for member in found.members] == images_of(raw)
                    # A header with another name and the right checksum is no damage, but another tar.
                    assert forged or len(found.members) == 3
                    survived += 1
    print(f"{refused} refused, {survived} read as they are")
    assert min(refused, survived) > SCANS // 20


def test_damaged_manifests(tmp_path: Path, random_samples) -> None:
    whole = tiny(tmp_path, random_samples(6, resolution=4), "raw")
    path = tmp_path / MANIFEST_NAME
    text = path.read_bytes()
    survived = refused = 0
    deep = [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"[" + b"1," * 200_000 + b"1]", b"NaN", b"\xff\xfe{\0}\0"]
    with watched(tmp_path):
        for number in range(MANIFESTS):
            with case("manifest", number) as chance:
                path.write_bytes(deep[number] if number < len(deep) else mutated(text, chance, changed_value))
                try:
                    assert loaded(tmp_path, load_manifest(str(tmp_path))) == whole.content
                    survived += 1
                except DataError as error:
                    assert str(tmp_path) in str(error) or "has no split 'train'" in str(error)
                    refused += 1
    print(f"{refused} refused, {survived} read as they are")
    assert min(refused, survived) > MANIFESTS // 50
