"""LSUN's lmdb databases: one per split, each value an image file. They are read where they lie, on a local disk."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data import store
from data.errors import DataError
from data.prepare.deal import check_unmarked, held_out_of
from data.prepare.files import named, problem_of
from data.prepare.layout import Encoded, Stretch
from data.prepare.splits import split_of

DATABASE = "data.mdb"
"""Name of the file that makes a folder a database."""


def _entries(folder: str, images: tuple[bytes, int, int], start: int, stop: int) -> Iterator[Encoded]:
    """Consecutive images of a database, in the order of their keys.

    Args:
        folder: The database.
        images: Key of the first image, its place among all images, and the number of all.
        start: The first to give, counted from that.
        stop: Where to stop, counted from that.
    """
    first, number, _ = images
    with _transaction(folder) as transaction:
        cursor = transaction.cursor()
        if not cursor.set_key(first):
            raise DataError(f"{folder} lost the key {first!r} since it was listed: run the command again")
        for place, (key, value) in enumerate(cursor.iternext(keys=True, values=True)):
            if place >= stop:
                return
            if place < start:
                continue
            where = f"{folder}: {key.decode('ascii', 'replace')}"
            yield Encoded(
                key=f"{number + place:08d}", payload=value, label=0, where=where, problem=problem_of(len(value))
            )


def databases(listing: Mapping[str, int], root: str, *, size: int, held_out: int | None) -> dict[str, list[Stretch]]:
    """The images of each split, as stretches of `size` images, each for one shard.

    A database with "val" or "test" in its folder's name is the test split; without one the last images are.
    """
    if not store.is_local(root):
        raise DataError(f"{root} is not on this machine: an lmdb is read from a local disk only, so download it first")
    folders: dict[str, str] = {}
    for path in filter(lambda path: PurePosixPath(path).name == DATABASE, listing):
        folder = str(PurePosixPath(path).parent)
        place = store.absolute(root if folder == "." else store.join(root, folder))
        split = "train" if split_of(Path(place).name) in (None, "train") else "test"
        if split in folders:
            raise DataError(
                f"{folders[split]} and {place} are both of the {split} split: give a folder with one of them"
            )
        folders[split] = place
    if "train" not in folders:
        raise DataError(f"{root} holds no training database, only {folders['test']}: give bedroom_train_lmdb too")
    counts = {split: _count(place) for split, place in folders.items()}
    kept = counts["train"] - (0 if "test" in folders else held_out_of(counts["train"], held_out))
    found = {"train": _stretches(folders["train"], 0, kept, size)}
    if "test" in folders:
        check_unmarked(held_out)
        found["test"] = _stretches(folders["test"], 0, counts["test"], size)
    elif kept < counts["train"]:
        found["test"] = _stretches(folders["train"], kept, counts["train"], size)
    return found


def left_out(listing: Mapping[str, int]) -> tuple[str, ...]:
    """A note on the files that belong to no database."""
    others = [path for path in listing if PurePosixPath(path).name not in (DATABASE, "lock.mdb")]
    return (f"left out {len(others):,} files that belong to no lmdb: {named(others, 3)}",) if others else ()


def _count(folder: str) -> int:
    with _transaction(folder) as transaction:
        count = int(transaction.stat()["entries"])
    if count < 1:
        raise DataError(f"the lmdb {folder} is empty: download it again")
    return count


def _stretches(folder: str, first: int, end: int, size: int) -> list[Stretch]:
    """Images `first` to `end` (not included) as stretches of `size`; only keys are read, never a value."""
    found: list[Stretch] = []
    with _transaction(folder) as transaction:
        total = int(transaction.stat()["entries"])
        for place, key in enumerate(transaction.cursor().iternext(keys=True, values=False)):
            if first <= place < end and (place - first) % size == 0:
                images, count = (key, place, total), min(size, end - place)
                found.append(Stretch(kind="lmdb", images=images, count=count, read=partial(_entries, folder)))
    return found


@contextmanager
def _transaction(folder: str) -> Iterator[Any]:
    """Reads one state of the database; nothing is written, not even a lock."""
    try:
        import lmdb
    except ImportError as error:
        raise DataError(
            f"{folder} is an lmdb, and the package that reads it is not installed: pip install 'bcm[lsun]' or "
            "pip install lmdb. Or export the images into a folder and give that"
        ) from error
    try:
        with (
            lmdb.open(folder, readonly=True, lock=False, readahead=False) as environment,
            environment.begin() as transaction,
        ):
            yield transaction
    except lmdb.Error as error:
        raise DataError(f"cannot read the lmdb {folder} ({error}): download it again") from error
