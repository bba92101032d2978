"""What goes into which shard: a pure function of a source's listing, so that each shard can be written by itself."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.manifest import Shard
from data.prepare.pack import Form, Sample

_SHARDS_IN_RANGE = 8


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One image as its source holds it.

    Attributes:
        key: Its name inside the shards.
        payload: The image file.
        label: Its class, from 0.
        where: Its place in the source, for messages.
        problem: Why it cannot be read; "" if it can.
    """

    key: str
    payload: bytes
    label: int
    where: str
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A stretch of a source that is read in one go; it travels to the process that reads it.

    Attributes:
        kind: What sort of source it is.
        images: Which images these are; its `repr` does not say where the source happens to lie.
        count: How many they are.
        read: Called with `images`, a start and a stop: the images between these, in their order.
        version: Differs when one of the images was replaced by another of the same size.
    """

    kind: str
    images: Any
    count: int
    read: Callable[[Any, int, int], Iterator[Sample | Encoded]] = field(repr=False, compare=False)
    version: str = ""


@dataclass(frozen=True, kw_only=True)
class ShardRange:
    """Consecutive shards of one split, written from one stretch of the source.

    Attributes:
        split: The split.
        first: Number of its first shard.
        counts: Images of each shard.
        stretch: Where they come from.
        start: Place in the stretch of its first image.
    """

    split: str
    first: int
    counts: tuple[int, ...]
    stretch: Stretch
    start: int = 0

    def only(self, begin: int, end: int) -> "ShardRange":
        """Its shards `begin` to `end` (not included), counted from its first."""
        start = self.start + sum(self.counts[:begin])
        return replace(self, first=self.first + begin, counts=self.counts[begin:end], start=start)

    def fingerprint(self, form: Form) -> str:
        """Hash of all that decides the bytes of its shards."""
        return hashlib.sha256(repr((form, self)).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A whole data set, before any of its images is read.

    Attributes:
        name: Name of the data set.
        form: Size and encoding of its images.
        class_names: Name of each label, in label order.
        flip: Whether mirrored images may be trained on.
        ranges: All shards there are to write.
        labels: Images of each class, for each split.
        labels_from: Where the labels came from, as a phrase; "" if there is one class.
        notes: What the user should know of the source.
        kept: Shards of each split that stay where they are, if none is to be written.
        root: Where these are.
    """

    name: str
    form: Form
    class_names: tuple[str, ...]
    flip: bool
    ranges: tuple[ShardRange, ...]
    labels: Mapping[str, tuple[int, ...]]
    labels_from: str = ""
    notes: tuple[str, ...] = ()
    kept: Mapping[str, tuple[Shard, ...]] = field(default_factory=dict)
    root: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """Images of each split."""
        return {split: sum(counts) for split, counts in self.labels.items()}


def shard_ranges(split: str, stretches: Sequence[Stretch], samples_per_shard: int) -> list[ShardRange]:
    """Ranges of up to eight shards for the stretches; no shard holds images of two of them."""
    ranges: list[ShardRange] = []
    first = 0
    for stretch in stretches:
        counts = (min(samples_per_shard, stretch.count - at) for at in range(0, stretch.count, samples_per_shard))
        whole = ShardRange(split=split, first=first, counts=tuple(counts), stretch=stretch)
        shards = len(whole.counts)
        ranges += [whole.only(at, min(at + _SHARDS_IN_RANGE, shards)) for at in range(0, shards, _SHARDS_IN_RANGE)]
        first += shards
    return ranges
