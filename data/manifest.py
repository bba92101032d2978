"""What lies beside the shards: `manifest.json`, which says what every shard must hold."""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data import store
from data.errors import DataError
from data.record import read_record

MANIFEST_NAME = "manifest.json"
LARGEST_RESOLUTION = 1024

_TAR_BLOCK = 512
_LARGEST_COUNT = 2**24  # samples of a shard, so that what its entry takes in memory is bounded
_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPLIT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise DataError(problem)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file.

    Attributes:
        path: Where it lies, relative to the manifest.
        bytes: Its length.
        sha256: Its hash, in lower-case hex.
        count: Number of samples in it.
        places: Where its images lie: "first+stride*size" if they are of one size and evenly spaced, as raw ones are;
            else base64 of little-endian uint32 pairs, the gap before each image and its size.
    """

    path: str
    bytes: int
    sha256: str
    count: int
    places: str

    def __post_init__(self) -> None:
        """Checks every field against the others."""
        parts = self.path.split("/")
        clean = not ({"", ".", ".."} & set(parts)) and not re.search(r"[\\:\x00-\x1f]", self.path)
        _require(clean, f"shard path {self.path!r} must be relative to the manifest and stay beneath it")
        _require(self.bytes >= 0, f"{self.path}: bytes is {self.bytes}, which is negative")
        _require(self.count > 0, f"{self.path}: it is listed with no samples")
        _require(self.count <= _LARGEST_COUNT, f"{self.path}: count is {self.count}, more than a shard may hold")
        hashed = _HEX_SHA256.fullmatch(self.sha256) is not None
        _require(hashed, f"{self.path}: sha256 must be 64 lower-case hexadecimal digits")
        offsets, sizes = self.offsets, self.sizes
        _require(
            len(offsets) == len(sizes) == self.count,
            f"{self.path}: count is {self.count}, but it has {len(offsets)} places",
        )
        begins = offsets >= np.concatenate([[_TAR_BLOCK], (offsets + sizes)[:-1]])
        if not begins.all():
            at = offsets[np.argmin(begins)]
            raise DataError(f"{self.path}: the image at byte {at} overlaps what lies before it")
        end = offsets[-1] + sizes[-1]
        _require(end <= self.bytes, f"{self.path}: an image ends at byte {end}, beyond the shard's {self.bytes} bytes")

    @staticmethod
    def of(path: str, length: int, sha256: str, offsets: Sequence[int], sizes: Sequence[int]) -> "Shard":
        """The entry of a tar whose images begin at these bytes and have these sizes."""
        return Shard(path=path, bytes=length, sha256=sha256, count=len(offsets), places=_written(offsets, sizes))

    @property
    def _arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        try:
            if match := re.fullmatch(r"(\d{1,18})\+(\d{1,18})\*(\d{1,18})", self.places):
                first, stride, size = map(int, match.groups())
                return first + stride * np.arange(self.count), np.full(self.count, size, np.int64)
            pairs = np.frombuffer(base64.b64decode(self.places, validate=True), "<u4").reshape(-1, 2).astype(np.int64)
        except (ValueError, OverflowError, MemoryError) as error:
            raise DataError(f"{self.path}: places are neither first+stride*size nor base64 of pairs") from error
        ends = pairs.sum(1).cumsum()
        return ends - pairs[:, 1], pairs[:, 1]

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """First byte of each image inside the tar, in the order of the samples, int64 of shape (count,)."""
        return self._arrays[0]

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each image, int64 of shape (count,)."""
        return self._arrays[1]


def _written(offsets: Sequence[int], sizes: Sequence[int]) -> str:
    starts, lengths = np.array(offsets, np.int64), np.array(sizes, np.int64)
    strides = np.diff(starts)
    if len(starts) and (lengths == lengths[0]).all() and (strides == strides[:1]).all():
        return f"{starts[0]}+{strides[0] if len(strides) else 0}*{lengths[0]}"
    gaps = starts - np.concatenate([[0], (starts + lengths)[:-1]])
    pairs = np.stack([gaps, lengths], axis=1) if len(starts) else np.empty((0, 2), np.int64)
    if ((pairs < 0) | (pairs >= 2**32)).any():
        raise DataError("the images of a tar must lie one after another, each of them and each gap below 4 GiB")
    return base64.b64encode(pairs.astype("<u4").tobytes()).decode("ascii")


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """The shards of one split, in order. The id of an image is its place in this order, from 0.

    Attributes:
        count: Number of images.
        shards: The tar files.
    """

    count: int
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        """Checks that the counts add up."""
        _require(self.count > 0, f"a split's count must be a whole number > 0, not {self.count!r}")
        total = sum(shard.count for shard in self.shards)
        _require(total == self.count, f"the shards hold {total} images, but the split's count is {self.count}")


@dataclass(frozen=True, kw_only=True)
class Making:
    """What a set was made of and how, as far as it decides what is in the set.

    Attributes:
        files: Files of the source.
        bytes: Their bytes.
        names: Hash of their names and sizes; "" if every copy of the source is the same.
        versions: Hash of what changes when one of them is replaced: its ETag, or the time of its last change.
        options: What the user decided, or the default for it, by the option's name.
        left_out: Images of each split that could not be used.
    """

    files: int
    bytes: int
    names: str
    versions: str
    options: Mapping[str, str | int | float | bool | None]
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole data set in storage.

    Attributes:
        name: Name of the data set.
        resolution: Height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        class_names: Name of each label, in label order.
        flip: Whether mirrored images may be trained on.
        splits: Shards of each split.
        root: URL of the folder that the shards' paths start from; "" for the manifest's own.
        made: What it was made of and how; None for a set that was prepared before this was kept.
        format: What kind of file this is.
        version: Of the format.
    """

    name: str
    resolution: int
    channels: int
    class_names: tuple[str, ...]
    flip: bool
    splits: Mapping[str, SplitManifest]
    root: str = ""
    made: Making | None = field(default=None, compare=False)
    format: Literal["bcm-shards"] = "bcm-shards"
    version: Literal[2] = 2

    def __post_init__(self) -> None:
        """Checks every field; the splits become read-only."""
        _require(self.name != "", "name must be a non-empty text")
        sized = 0 < self.resolution <= LARGEST_RESOLUTION
        _require(sized, f"resolution must be a whole number from 1 to {LARGEST_RESOLUTION}")
        _require(self.channels in (1, 3), f"channels must be 1 or 3, not {self.channels!r}")
        _require(len(self.class_names) > 0, "class_names must be a non-empty list of texts")
        _require(len(self.splits) > 0, "there are no splits")
        for split in self.splits:
            _require(_SPLIT_NAME.fullmatch(split) is not None, f"split name {split!r} must be of a-z, 0-9, '_' and '-'")
        paths = [shard.path for split in self.splits.values() for shard in split.shards]
        repeated = sorted(path for path, times in Counter(paths).items() if times > 1)
        _require(not repeated, f"shard listed twice: {', '.join(repeated[:3])}")
        object.__setattr__(self, "splits", MappingProxyType(dict(self.splits)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles through JSON, because a read-only mapping does not pickle."""
        return parse_manifest, (self.to_json(), "pickled manifest")

    def to_json(self) -> str:
        """The canonical JSON text: sorted keys, no spaces, ASCII."""
        value: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        value["splits"] = {name: asdict(split) for name, split in self.splits.items()}
        value["made"] = asdict(self.made) if self.made else None
        value = {name: fact for name, fact in value.items() if fact not in ("", None)}
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @cached_property
    def sha256(self) -> str:
        """Hash of the canonical JSON but for `made`: it names the data set down to the last byte of every shard."""
        return hashlib.sha256(replace(self, made=None).to_json().encode("ascii")).hexdigest()

    def place(self, url: str) -> str:
        """URL of the folder that the shards' paths start from, for a manifest found under `url`."""
        return self.root or url

    def split(self, name: str) -> SplitManifest:
        """The split called `name`, or a DataError that lists those there are."""
        if name not in self.splits:
            raise DataError(f"data set {self.name!r} has no split {name!r}; it has {', '.join(sorted(self.splits))}")
        return self.splits[name]


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """The Manifest in a JSON text, checked strictly; `where` (its URL) begins every error message."""
    try:
        return read_record(Manifest, _current(text))
    except (DataError, RecursionError) as error:
        raise DataError(
            f"{where} is not a valid manifest: {error}. Write the set again with python -m pipelines.prepare."
        ) from None


def _current(text: str | bytes) -> str | bytes:
    """The text of a manifest of version 1, which lists every offset and size, in the form of version 2."""
    if not re.search(rb'"version"\s*:\s*1\b', text if isinstance(text, bytes) else text.encode()):
        return text
    try:
        value = json.loads(text)
        for split in value["splits"].values():
            for shard in split["shards"]:
                offsets, sizes = shard.pop("offsets"), shard.pop("sizes")
                if {type(number) for number in (value["version"], *offsets, *sizes)} == {int}:
                    shard["places"] = _written(offsets, sizes)
        return json.dumps({**value, "version": 2})
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return text  # which is refused, with the reason


def write_manifest(url: str, manifest: Manifest) -> None:
    """Writes `manifest.json` under `url`: the last step, after which the set counts as whole."""
    store.write_bytes(store.join(url, MANIFEST_NAME), (manifest.to_json() + "\n").encode("ascii"))


def load_manifest(url: str) -> Manifest:
    """The manifest of the data set at `url`, checked strictly."""
    place = store.join(url, MANIFEST_NAME)
    if not store.exists(place):
        raise DataError(
            f"there is no data set at {url} (no {MANIFEST_NAME}): it was never prepared, or that was interrupted. "
            "Run python -m pipelines.prepare to make it."
        )
    return parse_manifest(store.read_bytes(place), place)


def shard_problems(url: str, manifest: Manifest) -> list[str]:
    """A sentence for each shard that is missing or has another length than stated. No shard is read, only listed."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    url = manifest.place(url)
    folders = {str(PurePosixPath(shard.path).parent) for shard in shards}
    sizes = {folder: store.file_sizes(url if folder == "." else store.join(url, folder)) for folder in folders}
    problems: list[str] = []
    for shard in shards:
        path = PurePosixPath(shard.path)
        actual = sizes[str(path.parent)].get(path.name)
        if actual is None:
            problems.append(f"{store.join(url, shard.path)} is missing")
        elif actual != shard.bytes:
            problems.append(f"{store.join(url, shard.path)} has {actual} bytes, but the manifest states {shard.bytes}")
    return problems


def check_shards(url: str, manifest: Manifest) -> None:
    """Cheap check, without reading any shard, that all are there with the lengths the manifest states."""
    if problems := shard_problems(url, manifest):
        more = f" ({len(problems)} shards have such problems)" if len(problems) > 1 else ""
        raise DataError(
            f"{problems[0]}{more}. Copy the shards again from a good source, or run python -m pipelines.prepare again, "
            "which writes an incomplete set anew."
        )


def shard_name(split: str, index: int) -> str:
    """File name of a shard, relative to the manifest."""
    return f"{split}-{index:06d}.tar"
