"""Images -> WebDataset shards and their manifest, at any URL.

Shards are plain USTAR files that stock `webdataset` reads: `{key}.png` and `{key}.cls` for each sample. The same
samples give the same bytes. The manifest is written last, so a set that was left half-written has none and is never
taken for whole.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data import storage
from data.errors import DataError
from data.manifest import MANIFEST_NAME, Manifest, Shard, SplitManifest, parse_manifest, shard_name

__all__ = [
    "SAMPLES_PER_SHARD",
    "Manifest",
    "Sample",
    "Shard",
    "SplitManifest",
    "check_shards",
    "load_manifest",
    "shard_problems",
    "write_manifest",
    "write_split",
]

SAMPLES_PER_SHARD = 1000
"""Samples in each shard but the last of a split: 3 MB of CIFAR-10."""

# A whole number: for a fraction, and even for 0.0, the tar writer would add a header block beyond plain USTAR.
_MODIFIED = 0


@dataclass(frozen=True, eq=False)
class Sample:
    """One labelled image.

    Attributes:
        key: Its name inside the shards: unique in the split, without dots or slashes.
        image: uint8 pixels, of shape (height, width) or (height, width, 3).
        label: Its class, from 0.
    """

    key: str
    image: NDArray[np.uint8]
    label: int

    def __post_init__(self) -> None:
        """Checks what a shard could not hold."""
        if not self.key or set("./\\") & set(self.key) or not self.key.isascii() or len(self.key) > 90:
            raise DataError(f"sample key {self.key!r} must be 1 to 90 ASCII characters without dots or slashes")
        shape = self.image.shape
        if self.image.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)):
            raise DataError(
                f"sample {self.key}: image must be uint8 of shape (height, width) or (height, width, 3), "
                f"not {self.image.dtype} of shape {shape}"
            )
        if self.label < 0:
            raise DataError(f"sample {self.key}: label {self.label} is negative")


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _tar(samples: Iterable[Sample]) -> bytes:
    # webdataset imports torch, which those who only read a manifest need not wait for.
    from webdataset.writer import TarWriter

    buffer = io.BytesIO()
    with TarWriter(buffer, user="", group="", mtime=_MODIFIED, encoder=False) as writer:
        for sample in samples:
            label = str(int(sample.label)).encode("ascii")
            writer.write({"__key__": sample.key, "png": _png(sample.image), "cls": label})
    return buffer.getvalue()


def _described(path: str, payload: bytes) -> Shard:
    """The manifest entry of a finished shard, read back from its bytes."""
    with tarfile.open(fileobj=io.BytesIO(payload), mode="r:") as tar:
        images = [member for member in tar if member.name.endswith(".png")]
    return Shard(
        path=path,
        bytes=len(payload),
        sha256=hashlib.sha256(payload).hexdigest(),
        count=len(images),
        offsets=tuple(member.offset_data for member in images),
        sizes=tuple(member.size for member in images),
    )


def _uniform(samples: Iterable[Sample], split: str) -> Iterator[Sample]:
    """The samples, as long as their keys differ and their images have one shape."""
    shape: tuple[int, ...] | None = None
    keys: set[str] = set()
    for sample in samples:
        if shape is not None and sample.image.shape != shape:
            raise DataError(
                f"{split} sample {sample.key} has shape {sample.image.shape}, but those before it have {shape}"
            )
        if sample.key in keys:
            raise DataError(f"{split} sample key {sample.key!r} occurs twice: give each sample its own key")
        shape = sample.image.shape
        keys.add(sample.key)
        yield sample


def write_split(
    url: str, split: str, samples: Iterable[Sample], *, samples_per_shard: int = SAMPLES_PER_SHARD
) -> SplitManifest:
    """Writes the shards of one split under `url` and returns their description; writes no manifest."""
    if samples_per_shard < 1:
        raise DataError(f"samples per shard is {samples_per_shard}: give at least 1")
    shards: list[Shard] = []
    stream = _uniform(samples, split)
    while batch := list(islice(stream, samples_per_shard)):
        name = shard_name(split, len(shards))
        payload = _tar(batch)
        storage.write_bytes(storage.join(url, name), payload)
        shards.append(_described(name, payload))
    return SplitManifest(count=sum(shard.count for shard in shards), shards=tuple(shards))


def write_manifest(url: str, manifest: Manifest) -> None:
    """Writes `manifest.json` under `url`: the last step, after which the set counts as whole."""
    storage.write_bytes(storage.join(url, MANIFEST_NAME), (manifest.to_json() + "\n").encode("ascii"))


def load_manifest(url: str) -> Manifest:
    """The manifest of the data set at `url`, checked strictly."""
    place = storage.join(url, MANIFEST_NAME)
    if not storage.exists(place):
        raise DataError(
            f"there is no data set at {url} (no {MANIFEST_NAME}): it was never prepared, or that was interrupted. "
            "Run python -m pipelines.prepare to make it."
        )
    return parse_manifest(storage.read_json(place), place)


def shard_problems(url: str, manifest: Manifest) -> list[str]:
    """A sentence for each shard that is missing or has another length than stated. No shard is read, only listed."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    folders = {str(PurePosixPath(shard.path).parent) for shard in shards}
    sizes = {folder: storage.file_sizes(url if folder == "." else storage.join(url, folder)) for folder in folders}
    problems: list[str] = []
    for shard in shards:
        path = PurePosixPath(shard.path)
        actual = sizes[str(path.parent)].get(path.name)
        if actual is None:
            problems.append(f"{storage.join(url, shard.path)} is missing")
        elif actual != shard.bytes:
            problems.append(
                f"{storage.join(url, shard.path)} has {actual} bytes, but the manifest states {shard.bytes}"
            )
    return problems


def check_shards(url: str, manifest: Manifest) -> None:
    """Cheap check, without reading any shard, that all are there with the lengths the manifest states."""
    if problems := shard_problems(url, manifest):
        more = f" ({len(problems)} shards have such problems)" if len(problems) > 1 else ""
        raise DataError(
            f"{problems[0]}{more}. Copy the shards again from a good source, or run python -m pipelines.prepare again, "
            "which writes an incomplete set anew."
        )
