"""Writes the shards of a layout, each with a note beside it, so that a killed run goes on where it was.

A note is a hidden file that says what the shard was made from and what it must hold. It is written after its shard, and
all are removed after the manifest is written.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any, TypeVar

from data import store
from data.errors import DataError
from data.manifest import Shard, read_record, shard_name
from data.prepare.layout import Encoded, Layout, ShardRange
from data.prepare.pack import Form, Sample, pack, shard_of
from data.prepare.pixels import square

T = TypeVar("T")
R = TypeVar("R")

Runner = Callable[[Callable[[Any], Iterator[Any]], Sequence[Any]], Iterator[Any]]
"""Calls a function on each of several tasks, somewhere, and yields what the calls yield, in any order."""

Written = tuple[str, int, Shard]
"""A shard that is in storage: its split, its number and its entry in the manifest."""

_NOTE = ".{}.json"
_LEFT_BEHIND = re.compile(r"\.[\w.-]+\.(?:tar|json)\.[0-9a-f]{32}\.tmp|\.[\w-]+-\d{6}\.tar\.json")
_READERS = 16
_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class Note:
    """What lies beside a shard until the set is whole: what it was made from, and what it must hold."""

    source: str
    shard: Shard


def in_turn(call: Callable[[T], Iterator[R]], tasks: Sequence[T]) -> Iterator[R]:
    """The plain `Runner`: one task after the other, in this process."""
    for task in tasks:
        yield from call(task)


def write_shards(shards: ShardRange, *, to: str, form: Form) -> Iterator[Written | list[str]]:
    """Writes consecutive shards under the URL `to`; of one with unreadable images only their problems are told."""
    stretch = shards.stretch
    entries = stretch.read(stretch.images, shards.start, shards.start + sum(shards.counts))
    for place, count in enumerate(shards.counts):
        index = shards.first + place
        problems: list[str] = []
        payload, offsets, sizes = pack(_samples(islice(entries, count), form, problems), form.encoding)
        if problems:
            yield problems
            continue
        shard = shard_of(shard_name(shards.split, index), payload, offsets, sizes)
        if shard.count != count:
            raise DataError(f"the source gave {shard.count} images for {shard.path}, not {count}: it has changed")
        store.write_bytes(store.join(to, shard.path), payload)
        note = Note(source=shards.only(place, place + 1).fingerprint(form), shard=shard)
        store.write_json(store.join(to, _NOTE.format(shard.path)), asdict(note))
        yield shards.split, index, shard


def _samples(entries: Iterator[Sample | Encoded], form: Form, problems: list[str]) -> Iterator[Sample]:
    """The entries with their pixels; the problems of those that have none are noted."""
    for entry in entries:
        try:
            if isinstance(entry, Encoded):
                image = square(entry.payload, form.resolution, form.channels, entry.where)
                entry = Sample(key=entry.key, image=image, label=entry.label)
        except DataError as error:
            problems.append(str(error))
            continue
        yield entry


def pending(layout: Layout, to: str) -> tuple[list[Written], list[ShardRange]]:
    """The shards that an earlier run wrote and noted, and ranges of those it did not."""
    sizes = store.file_sizes(to)
    written: list[Written] = []
    missing: list[ShardRange] = []
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        for shards in layout.ranges:
            places = range(len(shards.counts))
            singles = [shards.only(place, place + 1) for place in places]
            noted = list(pool.map(partial(_noted, layout.form, to, sizes), singles))
            written += [found for found in noted if found is not None]
            for lacking, group in groupby(places, key=lambda place: noted[place] is None):
                if lacking:
                    whole = list(group)
                    missing.append(shards.only(whole[0], whole[-1] + 1))
    return written, missing


def _noted(form: Form, to: str, sizes: Mapping[str, int], single: ShardRange) -> Written | None:
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
    if not same or note.shard.path != name or note.shard.bytes != sizes[name]:
        return None
    return single.split, single.first, note.shard


def healthy(results: Iterator[Written | list[str]]) -> Iterator[Written]:
    """The shards among the results; unreadable images are one DataError that names them, at the end."""
    problems: list[str] = []
    for result in results:
        if isinstance(result, list):
            problems += result
        else:
            yield result
    if problems:
        listed = "\n  ".join(problems[:_NAMED])
        more = f"\n  and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise DataError(
            f"{len(problems)} images of the source cannot be used:\n  {listed}{more}\n"
            "Replace or remove them, then run the same command: shards that are not concerned are kept."
        )


def clear_notes(to: str) -> None:
    """Removes the notes, and what a killed run left half-written on a disk."""
    for name in store.file_sizes(to):
        if _LEFT_BEHIND.fullmatch(name):
            store.remove(store.join(to, name))
