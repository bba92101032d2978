"""Fashion-MNIST as its authors give it: four idx files, packed with gzip."""

import gzip
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import PurePosixPath
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from data import store
from data.catalog import facts
from data.errors import DataError
from data.prepare.layout import Stretch
from data.prepare.pack import Sample
from data.prepare.remote import open_seekable

SHA256: Mapping[str, str] = MappingProxyType(
    {
        "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    }
)
"""SHA-256 of each file's content, unpacked; Debian's copies lack the file's name that the official gzip headers hold.

With that name and its time put back they have the MD5s that the authors publish.
"""
_PREFIXES = {"train": "train", "test": "t10k"}
_HEADER_OF_IMAGES, _HEADER_OF_LABELS = 16, 8
_SIDE = 28
_LONGEST = 64 * 2**20


def _content(url: str, name: str) -> bytes:
    """What the file called `name` at `url` holds, unpacked and compared with its hash."""
    again = f"download it again, or give the folder of Debian's package. {facts('fashion-mnist').source_note}"
    try:
        with open_seekable(url) as packed, gzip.GzipFile(fileobj=packed) as file:
            content = file.read(_LONGEST)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {url} ({type(error).__name__}: {error}): {again}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[name]:
        raise DataError(
            f"{url}, unpacked, has {len(content):,} bytes and the SHA-256 {digest}, but Fashion-MNIST's has "
            f"{SHA256[name]} (files of MNIST have the same names): {again}"
        )
    return content


def _labels(url: str, name: str) -> NDArray[np.uint8]:
    return np.frombuffer(_content(url, name), np.uint8, offset=_HEADER_OF_LABELS)


def entries(urls: tuple[str, str], split: tuple[str, str, str], start: int, stop: int) -> Iterator[Sample]:
    """Images of a split from `start` to `stop`.

    Args:
        urls: Its files of images and of labels.
        split: Its prefix in their names, and their hashes.
        start: The first image to give.
        stop: Where to stop.
    """
    prefix = split[0]
    pixels = np.frombuffer(_content(urls[0], f"{prefix}-images-idx3-ubyte.gz"), np.uint8, offset=_HEADER_OF_IMAGES)
    images, labels = pixels.reshape(-1, _SIDE, _SIDE), _labels(urls[1], f"{prefix}-labels-idx1-ubyte.gz")
    for index in range(start, stop):
        yield Sample(key=f"{prefix}{index:05d}", image=images[index], label=int(labels[index]))


def stretches(listing: Mapping[str, int], root: str) -> tuple[dict[str, list[Stretch]], dict[str, tuple[int, ...]]]:
    """The images of each split, in the official order, and how many there are of each class."""
    found: dict[str, str] = {}
    for path in listing:
        name = PurePosixPath(path).name
        if name in found:
            raise DataError(f"{root} holds {name} twice, as {found[name]} and {path}: remove one")
        found[name] = path
    if missing := [name for name in SHA256 if name not in found]:
        raise DataError(f"{root} lacks {', '.join(missing)}: give a folder with all four files")
    parts: dict[str, list[Stretch]] = {}
    labels: dict[str, tuple[int, ...]] = {}
    for split, prefix in _PREFIXES.items():
        names = f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"
        urls = store.join(root, found[names[0]]), store.join(root, found[names[1]])
        of_split = _labels(urls[1], names[1])
        labels[split] = tuple(np.bincount(of_split, minlength=len(facts("fashion-mnist").class_names)).tolist())
        images = prefix, SHA256[names[0]], SHA256[names[1]]
        parts[split] = [Stretch(kind="idx", images=images, count=len(of_split), read=partial(entries, urls))]
    return parts, labels
