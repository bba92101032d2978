"""What goes into which shard: a pure function of a source's listing, so that each shard can be written by itself."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from data.prepare.pack import Form, Sample

_SHARDS_PER_TASK = 8


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One image as its source holds it.

    Attributes:
        key: Its name inside the shards.
        payload: The image file.
        label: Its class, from 0.
        where: Its place in the source, for messages.
    """

    key: str
    payload: bytes
    label: int
    where: str


class Part(Protocol):
    """A stretch of a source that is read in one go; it travels to the process that reads it.

    Its `repr` says which images these are, and not where the source happens to lie.
    """

    def entries(self, start: int, stop: int) -> Iterator[Sample | Encoded]:
        """Its images from `start` to `stop`, in their order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """Consecutive shards of one split, written from one part of the source.

    Attributes:
        split: The split.
        first: Number of its first shard.
        counts: Images of each shard.
        part: Where they come from.
        start: Place in the part of its first image.
    """

    split: str
    first: int
    counts: tuple[int, ...]
    part: Part
    start: int = 0

    @property
    def images(self) -> int:
        """Images in all its shards."""
        return sum(self.counts)

    def only(self, begin: int, end: int) -> "Task":
        """The task of its shards `begin` to `end` (not included), counted from its first."""
        start = self.start + sum(self.counts[:begin])
        return replace(self, first=self.first + begin, counts=self.counts[begin:end], start=start)

    def fingerprint(self, form: Form) -> str:
        """Hash of all that decides the bytes of its shards."""
        return hashlib.sha256(repr((form, self)).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole data set, before any of its images is read.

    Attributes:
        name: Name of the data set.
        form: Size and encoding of its images.
        class_names: Name of each label, in label order.
        flip: Whether mirrored images may be trained on.
        tasks: All there is to write.
        local: Whether the source can be read on this machine only.
        notes: What the user should know of the source.
    """

    name: str
    form: Form
    class_names: tuple[str, ...]
    flip: bool
    tasks: tuple[Task, ...]
    local: bool
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Images of each split."""
        return {split: self.images(split) for split in dict.fromkeys(task.split for task in self.tasks)}

    def images(self, split: str) -> int:
        """Images of one split."""
        return sum(task.images for task in self.tasks if task.split == split)


def chunks(total: int, size: int) -> tuple[int, ...]:
    """`total` as a sum of numbers that are all `size` but the last."""
    return tuple(min(size, total - start) for start in range(0, total, size))


def tasks_of(split: str, parts: Sequence[tuple[Part, int]], samples_per_shard: int) -> list[Task]:
    """Tasks of up to eight shards for parts, each with its number of images; no shard holds images of two parts."""
    tasks: list[Task] = []
    first = 0
    for part, count in parts:
        whole = Task(split=split, first=first, counts=chunks(count, samples_per_shard), part=part)
        shards = len(whole.counts)
        tasks += [whole.only(at, min(at + _SHARDS_PER_TASK, shards)) for at in range(0, shards, _SHARDS_PER_TASK)]
        first += shards
    return tasks
