"""What lies beside the shards: `manifest.json`, which says what every shard must hold."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from data import store
from data.errors import DataError

FORMAT = "bcm-shards"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
LARGEST_RESOLUTION = 1024

_TAR_BLOCK = 512
_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPLIT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise DataError(problem)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_counts(values: tuple[int, ...]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file.

    Attributes:
        path: Where it lies, relative to the manifest.
        bytes: Its length.
        sha256: Its hash, in lower-case hex.
        count: Number of samples in it.
        offsets: First byte of each image inside the tar, in the order of the samples.
        sizes: Number of bytes of each image.
    """

    path: str
    bytes: int
    sha256: str
    count: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        """Checks every field against the others."""
        _require(isinstance(self.path, str) and self.path != "", "a shard has no path")
        parts = self.path.split("/")
        clean = not ({"", ".", ".."} & set(parts)) and not re.search(r"[\\:\x00-\x1f]", self.path)
        _require(clean, f"shard path {self.path!r} must be relative to the manifest and stay beneath it")
        _require(
            _is_count(self.bytes) and _is_count(self.count), f"{self.path}: bytes and count must be whole numbers >= 0"
        )
        _require(self.count > 0, f"{self.path}: it is listed with no samples")
        hashed = isinstance(self.sha256, str) and _HEX_SHA256.fullmatch(self.sha256) is not None
        _require(hashed, f"{self.path}: sha256 must be 64 lower-case hexadecimal digits")
        numbers = _are_counts(self.offsets) and _are_counts(self.sizes)
        _require(numbers, f"{self.path}: offsets and sizes must be whole numbers >= 0")
        _require(
            len(self.offsets) == len(self.sizes) == self.count,
            f"{self.path}: count is {self.count}, but it has {len(self.offsets)} offsets and {len(self.sizes)} sizes",
        )
        end = _TAR_BLOCK
        for offset, size in zip(self.offsets, self.sizes, strict=True):
            _require(offset >= end, f"{self.path}: the image at byte {offset} overlaps what lies before it")
            end = offset + size
        _require(end <= self.bytes, f"{self.path}: an image ends at byte {end}, beyond the shard's {self.bytes} bytes")


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
        _require(
            _is_count(self.count) and self.count > 0, f"a split's count must be a whole number > 0, not {self.count!r}"
        )
        total = sum(shard.count for shard in self.shards)
        _require(total == self.count, f"the shards hold {total} images, but the split's count is {self.count}")


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
    """

    name: str
    resolution: int
    channels: int
    class_names: tuple[str, ...]
    flip: bool
    splits: Mapping[str, SplitManifest]
    root: str = ""

    def __post_init__(self) -> None:
        """Checks every field; the splits become read-only."""
        _require(isinstance(self.name, str) and self.name != "", "name must be a non-empty text")
        sized = _is_count(self.resolution) and 0 < self.resolution <= LARGEST_RESOLUTION
        _require(sized, f"resolution must be a whole number from 1 to {LARGEST_RESOLUTION}")
        _require(
            self.channels in (1, 3) and _is_count(self.channels), f"channels must be 1 or 3, not {self.channels!r}"
        )
        named = all(isinstance(name, str) for name in self.class_names) and len(self.class_names) > 0
        _require(named, "class_names must be a non-empty list of texts")
        _require(isinstance(self.flip, bool), "flip must be true or false")
        _require(isinstance(self.root, str), "root must be a text")
        _require(len(self.splits) > 0, "there are no splits")
        for split in self.splits:
            _require(_SPLIT_NAME.fullmatch(split) is not None, f"split name {split!r} must be of a-z, 0-9, '_' and '-'")
        paths = [shard.path for split in self.splits.values() for shard in split.shards]
        repeated = sorted(path for path, times in Counter(paths).items() if times > 1)
        _require(not repeated, f"shard listed twice: {', '.join(repeated[:3])}")
        object.__setattr__(self, "splits", MappingProxyType(dict(self.splits)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles through JSON, because a read-only mapping does not pickle."""
        return _unpickled, (self.to_json(),)

    def to_json(self) -> str:
        """The canonical JSON text: sorted keys, no spaces, ASCII."""
        value: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        value["splits"] = {name: asdict(split) for name, split in self.splits.items()}
        value |= {"format": FORMAT, "version": FORMAT_VERSION}
        if not self.root:
            del value["root"]
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @cached_property
    def sha256(self) -> str:
        """Hash of the canonical JSON: it names the data set down to the last byte of every shard."""
        return hashlib.sha256(self.to_json().encode("ascii")).hexdigest()

    def place(self, url: str) -> str:
        """URL of the folder that the shards' paths start from, for a manifest found under `url`."""
        return self.root or url

    def split(self, name: str) -> SplitManifest:
        """The split called `name`, or a DataError that lists those there are."""
        if name not in self.splits:
            raise DataError(f"data set {self.name!r} has no split {name!r}; it has {', '.join(sorted(self.splits))}")
        return self.splits[name]


def _unpickled(text: str) -> Manifest:
    return parse_manifest(json.loads(text), "pickled manifest")


def _table(value: object, keys: set[str], where: str) -> dict[str, Any]:
    """`value` as a dict with exactly `keys`."""
    if not isinstance(value, dict):
        raise DataError(f"{where} must be an object with the keys {', '.join(sorted(keys))}")
    missing, unknown = sorted(keys - set(value)), sorted(set(value) - keys)
    _require(not missing, f"{where} lacks {', '.join(missing)}")
    _require(not unknown, f"{where} has unknown keys: {', '.join(map(repr, unknown))}")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where} must be a list")
    return value


def parse_shard(value: object, where: str) -> Shard:
    """The Shard in a decoded JSON value, checked strictly; `where` begins some error messages."""
    table = _table(value, {field.name for field in fields(Shard)}, where)
    offsets, sizes = (tuple(_list(table[key], f"{where}.{key}")) for key in ("offsets", "sizes"))
    return Shard(**{**table, "offsets": offsets, "sizes": sizes})


def _split(value: object, where: str) -> SplitManifest:
    table = _table(value, {"count", "shards"}, where)
    shards = enumerate(_list(table["shards"], f"{where}.shards"))
    return SplitManifest(
        count=table["count"], shards=tuple(parse_shard(shard, f"{where}.shards[{i}]") for i, shard in shards)
    )


def parse_manifest(value: object, where: str) -> Manifest:
    """The Manifest in a decoded JSON value, checked strictly; `where` (its URL) begins every error message."""
    own = {field.name for field in fields(Manifest)}
    try:
        if isinstance(value, dict) and (value.get("format"), value.get("version")) != (FORMAT, FORMAT_VERSION):
            raise DataError(
                f"format is {value.get('format')!r} version {value.get('version')!r}, but this program reads "
                f"{FORMAT!r} version {FORMAT_VERSION}"
            )
        given = {"root": "", **value} if isinstance(value, dict) else value
        table = _table(given, own | {"format", "version"}, "the manifest")
        if not isinstance(table["splits"], dict):
            raise DataError("splits must be an object")
        splits = {name: _split(split, f"splits.{name}") for name, split in table["splits"].items()}
        names = tuple(_list(table["class_names"], "class_names"))
        rest = {key: table[key] for key in own - {"splits", "class_names"}}
        return Manifest(**rest, class_names=names, splits=splits)
    except DataError as error:
        raise DataError(
            f"{where} is not a valid manifest: {error}. Write the set again with python -m pipelines.prepare."
        ) from None


def shard_name(split: str, index: int) -> str:
    """File name of a shard, relative to the manifest."""
    return f"{split}-{index:06d}.tar"


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
    return parse_manifest(store.read_json(place), place)


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
