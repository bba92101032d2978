"""Writes the shards of a layout, each with a note beside it, so that a killed run goes on where it was.

A note is a hidden file that says what the shard was made from and what it must hold. It is written after its shard, and
all are removed after the manifest is written.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby, islice
from typing import Any, TypeVar

from data import store
from data.errors import DataError
from data.manifest import Shard, shard_name
from data.prepare.layout import Encoded, Layout, ShardRange
from data.prepare.pack import Form, Sample, pack, shard_of
from data.prepare.pixels import TOO_SMALL, square
from data.record import read_record

T = TypeVar("T")
R = TypeVar("R")

Runner = Callable[..., Iterator[Any]]
"""Calls a function on each of several tasks, and yields what the calls yield, in any order: here, or if it is told
`here=False`, anywhere."""

_NOTE = ".{}.json"
_LEFT_BEHIND = re.compile(r"\.[\w.-]+\.(?:tar|json)\.[0-9a-f]{32}\.tmp|\.[\w-]+-\d{6}\.tar\.json")
_READERS = 16
_NAMED = 10
LEFT_OUT = "left-out.txt"
"""What lies beside the manifest of a set from which images were left out: a line for each of them."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """What lies beside a shard until the set is whole.

    Attributes:
        source: What it was made from, as a hash.
        shard: What it must hold.
        remarks: What was done with images that their owner should know: to how many, and the name of one.
        left_out: The images that are not in it because they cannot be used, and why.
    """

    source: str
    shard: Shard
    remarks: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


Written = tuple[str, int, Note]
"""A shard that is in storage: its split, its number, and the note of it."""


def in_turn(call: Callable[[T], Iterator[R]], tasks: Sequence[T], *, here: bool = True) -> Iterator[R]:
    """The plain `Runner`: one task after the other, in this process."""
    for task in tasks:
        yield from call(task)


def write_shards(shards: ShardRange, *, to: str, form: Form, leave_out: bool) -> Iterator[Written | list[str]]:
    """Writes consecutive shards under the URL `to`.

    Of a shard with images that cannot be used, only their problems are told; if they may be left out, it is written
    without them.
    """
    stretch = shards.stretch
    entries = stretch.read(stretch.images, shards.start, shards.start + sum(shards.counts))
    for place, count in enumerate(shards.counts):
        index = shards.first + place
        problems: list[str] = []
        remarks: dict[str, tuple[int, str]] = {}
        payload, offsets, sizes = pack(_samples(islice(entries, count), form, problems, remarks), form.encoding)
        path = shard_name(shards.split, index)
        if len(offsets) + len(problems) != count:
            raise DataError(f"the source gave {len(offsets)} images for {path}, not {count}: it has changed")
        if problems and not (leave_out and offsets):
            yield problems
            continue
        source = shards.only(place, place + 1).fingerprint(form)
        shard = shard_of(path, payload, offsets, sizes)
        note = Note(source=source, shard=shard, remarks=remarks, left_out=tuple(problems))
        store.write_bytes(store.join(to, path), payload)
        store.write_json(store.join(to, _NOTE.format(path)), asdict(note))
        yield shards.split, index, note


def _samples(
    entries: Iterator[Sample | Encoded], form: Form, problems: list[str], remarks: dict[str, tuple[int, str]]
) -> Iterator[Sample]:
    """The entries with their pixels; the problems of those that have none are noted, and remarks on the others."""
    for entry in entries:
        if isinstance(entry, Encoded):
            try:
                if entry.problem:
                    raise DataError(f"{entry.where} {entry.problem}")
                image, found = square(entry.payload, form, entry.where)
            except DataError as error:
                problems.append(_printable(str(error)))
                continue
            add(remarks, {remark: (1, _printable(entry.where)) for remark in found})
            entry = Sample(key=entry.key, image=image, label=entry.label)
        yield entry


def samples_of(shards: ShardRange, form: Form) -> Iterator[Sample]:
    """The images that go into some shards; one that cannot be used is a DataError."""
    problems: list[str] = []
    entries = shards.stretch.read(shards.stretch.images, shards.start, shards.start + sum(shards.counts))
    for entry in entries:
        yield from _samples(iter([entry]), form, problems, {})
        if problems:
            raise DataError(problems[0])


def _printable(text: str) -> str:
    """Names of files may hold bytes that are no text."""
    return text.encode("utf-8", "backslashreplace").decode()


def add(remarks: dict[str, tuple[int, str]], more: Mapping[str, tuple[int, str]]) -> None:
    """Counts remarks together; the example that was there first is kept."""
    for remark, (count, example) in more.items():
        known, first = remarks.get(remark, (0, example))
        remarks[remark] = known + count, first


def most_left_out(skip_bad: str | None, total: int) -> int:
    """How many of `total` images may be left out: `skip_bad` is a number, or a share such as "1%"; None for none."""
    number = re.fullmatch(r"(\d{1,12})|(\d{1,2}(?:\.\d{1,6})?|100)%", "0" if skip_bad is None else skip_bad)
    if number is None:
        raise DataError(f"--skip-bad {skip_bad} is neither a number of images, such as 20, nor a share, such as 1%")
    return int(number[1]) if number[1] else int(total * float(number[2]) / 100)


def pending(layout: Layout, to: str, leave_out: bool) -> tuple[list[Written], list[ShardRange]]:
    """The shards that an earlier run wrote and noted, and ranges of those it did not."""
    sizes = store.file_sizes(to)
    written: list[Written] = []
    missing: list[ShardRange] = []
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        for shards in layout.ranges:
            places = range(len(shards.counts))
            singles = [shards.only(place, place + 1) for place in places]
            noted = list(pool.map(partial(_noted, layout.form, to, sizes, leave_out), singles))
            written += [found for found in noted if found is not None]
            for lacking, group in groupby(places, key=lambda place: noted[place] is None):
                if lacking:
                    whole = list(group)
                    missing.append(shards.only(whole[0], whole[-1] + 1))
    return written, missing


def _noted(form: Form, to: str, sizes: Mapping[str, int], leave_out: bool, single: ShardRange) -> Written | None:
    """A single shard if it is there as its note says, made from the same images in the same way; else None."""
    name = shard_name(single.split, single.first)
    note_name = _NOTE.format(name)
    if not {name, note_name} <= sizes.keys():
        return None
    try:
        note = read_record(Note, store.read_bytes(store.join(to, note_name)))
    except DataError:
        return None
    same = note.source == single.fingerprint(form)
    if not same or note.shard.path != name or note.shard.bytes != sizes[name] or (note.left_out and not leave_out):
        return None
    return single.split, single.first, note


def healthy(results: Iterator[Written | list[str]], most: int, problems: list[str]) -> Iterator[Written]:
    """The shards among the results; more than `most` images that cannot be used are one DataError, at the end.

    Args:
        results: What `write_shards` yields.
        most: How many may be left out.
        problems: Takes those that are.
    """
    for result in results:
        problems += result if isinstance(result, list) else result[2].left_out
        if not isinstance(result, list):
            yield result
    if len(problems) > most:
        problems.sort()
        listed = "\n  ".join(problems[:_NAMED])
        more = f"\n  and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        small = " Those that are too small can be used with --small enlarge." if TOO_SMALL in "".join(problems) else ""
        raise DataError(
            f"{len(problems)} images of the source cannot be used:\n  {listed}{more}\n"
            "Replace or remove them, then run the same command: shards that are not concerned are kept. Or leave them "
            f"out with --skip-bad {len(problems)}.{small}"
        )


def clear_notes(to: str) -> None:
    """Removes the notes, and what a killed run left half-written on a disk."""
    for name in store.file_sizes(to):
        if _LEFT_BEHIND.fullmatch(name):
            store.remove(store.join(to, name))
