"""Writes planned shards, each with a note beside it, so that a killed run goes on where it was.

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
from data.prepare.layout import Encoded, Plan, Task
from data.prepare.pack import Form, Sample, pack
from data.prepare.pixels import square

T = TypeVar("T")
R = TypeVar("R")

Runner = Callable[[Callable[[Any], Iterator[Any]], Sequence[Any]], Iterator[Any]]
"""Calls a function on each of several tasks, somewhere, and yields what the calls yield, in any order."""

_LEFT_BEHIND = re.compile(r"\.[\w.-]+\.(?:tar|json)\.[0-9a-f]{32}\.tmp|\.[\w-]+-\d{6}\.tar\.json")
_READERS = 16
_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class Note:
    """What lies beside a shard until the set is whole: what it was made from, and what it must hold."""

    source: str
    shard: Shard


@dataclass(frozen=True, kw_only=True)
class Written:
    """A shard that is in storage."""

    split: str
    index: int
    shard: Shard


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """Images that a shard cannot be written without, each with its problem."""

    problems: tuple[str, ...]


def in_turn(call: Callable[[T], Iterator[R]], tasks: Sequence[T]) -> Iterator[R]:
    """The plain `Runner`: one task after the other, in this process."""
    for task in tasks:
        yield from call(task)


def write_task(task: Task, *, to: str, form: Form) -> Iterator[Written | Damaged]:
    """Writes the shards of a task under the URL `to`; one with unreadable images is left out and told of."""
    entries = task.part.entries(task.start, task.start + task.images)
    for place, count in enumerate(task.counts):
        index = task.first + place
        problems: list[str] = []
        packed = pack(_samples(islice(entries, count), form, problems), form.encoding)
        if problems:
            yield Damaged(problems=tuple(problems))
            continue
        shard = packed.shard(shard_name(task.split, index))
        if shard.count != count:
            raise DataError(f"the source gave {shard.count} images for {shard.path}, not {count}: it has changed")
        store.write_bytes(store.join(to, shard.path), packed.payload)
        note = Note(source=task.only(place, place + 1).fingerprint(form), shard=shard)
        store.write_json(store.join(to, _note(shard.path)), asdict(note))
        yield Written(split=task.split, index=index, shard=shard)


def _note(path: str) -> str:
    return f".{path}.json"


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


def pending(plan: Plan, to: str) -> tuple[list[Written], list[Task]]:
    """The shards that an earlier run wrote and noted, and tasks for those it did not."""
    sizes = store.file_sizes(to)
    written: list[Written] = []
    tasks: list[Task] = []
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        for task in plan.tasks:
            places = range(len(task.counts))
            noted = list(pool.map(partial(_noted, task, plan.form, to, sizes), places))
            written += [found for found in noted if found is not None]
            runs = groupby(places, key=lambda place: noted[place] is None)
            tasks += [task.only((whole := list(run))[0], whole[-1] + 1) for missing, run in runs if missing]
    return written, tasks


def _noted(task: Task, form: Form, to: str, sizes: Mapping[str, int], place: int) -> Written | None:
    """A shard that is there as its note says, made from the same images in the same way; else None."""
    index = task.first + place
    name = shard_name(task.split, index)
    if not {name, _note(name)} <= sizes.keys():
        return None
    try:
        note = read_record(Note, store.read_bytes(store.join(to, _note(name))))
    except DataError:
        return None
    same = note.source == task.only(place, place + 1).fingerprint(form)
    if not same or note.shard.path != name or note.shard.bytes != sizes[name]:
        return None
    return Written(split=task.split, index=index, shard=note.shard)


def healthy(results: Iterator[Written | Damaged]) -> Iterator[Written]:
    """The shards among the results; unreadable images are one DataError that names them, at the end."""
    problems: list[str] = []
    for result in results:
        if isinstance(result, Damaged):
            problems += result.problems
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
