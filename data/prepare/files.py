"""Images as files: in a folder at any URL, or in a zip file. Classes are the folders they lie in."""

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePosixPath
from typing import BinaryIO

from data import store
from data.errors import DataError
from data.order import permutation
from data.prepare.layout import Encoded
from data.prepare.pixels import IMAGE_SUFFIXES, LARGEST_FILE
from data.prepare.remote import open_seekable

DEAL_SEED = 20240402
"""Seed of the order in which images of several classes are dealt to shards, so that each shard holds all of them."""

_MOST_HELD_OUT = 1000
_READERS = 16
_READ_AHEAD = 64
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_WORDS = re.compile(r"[a-z]+")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image file.

    Attributes:
        name: Its path in the folder or zip file.
        size: Its bytes.
        label: Its class.
        number: Its place among the files of its split, sorted by name.
    """

    name: str
    size: int
    label: int
    number: int


def folder_entries(root: str, items: Sequence[Item], start: int, stop: int) -> Iterator[Encoded]:
    """Image files of a folder; those of a server are read by several threads, as each takes a moment to answer.

    What they hold that was not given yet is at most 64 MiB together, or a single file.
    """

    def content(item: Item) -> bytes:
        return b"" if problem_of(item.size) else store.read_bytes(store.join(root, item.name))

    if store.is_local(root):
        for item in items[start:stop]:
            yield _encoded(item, content(item), root)
        return
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        while start < stop:
            held = accumulate(item.size for item in items[start : min(start + _READ_AHEAD, stop)])
            group = items[start : start + max(1, sum(size <= LARGEST_FILE for size in held))]
            for item, payload in zip(group, pool.map(content, group), strict=True):
                yield _encoded(item, payload, root)
            start += len(group)


def zip_entries(root: str, items: Sequence[Item], start: int, stop: int) -> Iterator[Encoded]:
    """Image files of a zip file, the checksum of each compared."""
    with open_seekable(root) as file, open_zip(file, root) as archive:
        for item in items[start:stop]:
            payload, problem = b"", ""
            try:
                payload = b"" if problem_of(item.size) else archive.read(item.name)
            except DataError:
                raise
            except Exception as error:  # zlib.error and lzma.LZMAError have no base but Exception
                problem = f"cannot be read ({error}): download the zip file again"
            yield _encoded(item, payload, root, problem)


def _encoded(item: Item, payload: bytes, root: str, problem: str = "") -> Encoded:
    where, problem = f"{root}/{item.name}", problem or problem_of(item.size)
    return Encoded(key=f"{item.number:08d}", payload=payload, label=item.label, where=where, problem=problem)


def problem_of(size: int) -> str:
    """Why a file of so many bytes is not read; "" if it is."""
    return "" if 0 < size <= LARGEST_FILE else f"has {size} bytes, not 1 to {LARGEST_FILE}"


def open_zip(file: BinaryIO, where: str) -> zipfile.ZipFile:
    """The zip file in an open file; anything else is a DataError."""
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{where} is not a whole zip file ({error}): download it again") from error


def sort_out(
    listing: Mapping[str, int], root: str, *, labelled: bool, held_out: int | None
) -> tuple[dict[str, tuple[Item, ...]], tuple[str, ...], tuple[str, ...]]:
    """The images of a listing by split, in the order in which they go into shards; the class names; notes for the user.

    Folders called train, val or test at the top are the splits; without them the last images are the test split.

    Args:
        listing: Bytes of each file, by path.
        root: Where that is, for messages.
        labelled: Whether the folders below are classes; else all images are of one class.
        held_out: Size of the test split where none is marked; None for a tenth, at most 1,000.
    """
    images = _images(listing, root)
    splits = _by_split(images)
    folders = sorted({folder for places in splits.values() for folder in places.values()}) if labelled else [""]
    if "" in folders and len(folders) > 1:
        loose = next(name for places in splits.values() for name, folder in places.items() if not folder)
        raise DataError(
            f"{root}/{loose} lies in no class folder, but others do, for example in {folders[1]!r}: "
            "give each image a folder named after its class, or none"
        )
    labels = {folder: label for label, folder in enumerate(folders)}
    found: dict[str, tuple[Item, ...]] = {}
    for split, places in splits.items():
        items = [
            Item(name=name, size=listing[name], label=labels.get(folder, 0), number=number)
            for number, (name, folder) in enumerate(places.items())
        ]
        # Those of several classes in a fixed shuffled order.
        order = range(len(items)) if len(labels) == 1 else permutation(DEAL_SEED, 0, len(items))
        found[split] = tuple(items[place] for place in order)
    others = sorted(set(listing) - set(images))
    notes = (f"left out {len(others)} files that are no images, for example {others[0]}",) if others else ()
    return _with_test(found, held_out), tuple(folder or "all" for folder in folders), notes


def _images(listing: Mapping[str, int], root: str) -> list[str]:
    images: list[str] = []
    for name in sorted(listing):
        path = PurePosixPath(name)
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden:
            images.append(name)
    if not images:
        raise DataError(f"there are no images (PNG, JPEG, WebP, PPM, BMP) at {root}: check the path")
    return images


def split_of(folder: str) -> str | None:
    """The split that a name such as "bedroom_val" marks: train, val, test or none."""
    return next((_SPLITS[word] for word in _WORDS.findall(folder.lower()) if word in _SPLITS), None)


def _by_split(images: Sequence[str]) -> dict[str, dict[str, str]]:
    """For each split its images, and the folder in which each lies: "" for none."""
    paths = {name: name.split("/") for name in images}
    while (tops := {path[0] if path[1:] else "" for path in paths.values()}) and len(tops) == 1:
        (top,) = tops
        if not top or split_of(top):
            break
        paths = {name: path[1:] for name, path in paths.items()}
    marked = all(split_of(top) for top in tops)
    splits: dict[str, dict[str, str]] = {}
    for name, path in paths.items():
        split = (split_of(path[0]) if marked else None) or "train"
        below = path[1:] if marked else path
        splits.setdefault(split, {})[name] = below[0] if below[1:] else ""
    return splits


def _with_test(found: Mapping[str, tuple[Item, ...]], held_out: int | None) -> dict[str, tuple[Item, ...]]:
    """The splits, with one called test wherever there are images for it."""
    splits = dict(found)
    if "train" not in splits:
        raise DataError(f"the images are all of the split {', '.join(splits)}: give the folder that holds train too")
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
    if "test" in splits:
        check_unmarked(held_out)
        return splits
    train = splits["train"]
    kept = len(train) - held_out_of(len(train), held_out)
    splits |= {"train": train[:kept], "test": train[kept:]}
    return {split: items for split, items in splits.items() if items}


def check_unmarked(held_out: int | None) -> None:
    """Called where the source marks a test split: holding out images of the training split too is a DataError."""
    if held_out is not None:
        raise DataError("--held-out has no effect on a source that marks its test split: leave it out")


def held_out_of(count: int, wanted: int | None) -> int:
    """Images of `count` that make up the test split where none is marked: by default a tenth, at most 1,000."""
    if wanted is None:
        return min(_MOST_HELD_OUT, count // 10)
    if not 0 <= wanted < count:
        raise DataError(f"{wanted} images cannot be held out of {count}: give a number from 0 to {count - 1}")
    return wanted
