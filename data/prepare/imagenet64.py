"""ImageNet-64 as its authors give it: the npz batches of the downsampled ImageNet, read as a stream of rows."""

import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from data import store
from data.catalog import facts
from data.errors import DataError
from data.prepare.files import named, open_zip
from data.prepare.layout import Stretch
from data.prepare.pack import Sample
from data.prepare.remote import open_seekable

BATCH = re.compile(r"(?:train_data(?:_batch)?_(?P<number>\d+)|(?P<val>val_data))\.npz")
"""Names of the batch files."""
_SIDE = 64
_PIXELS = 3 * _SIDE * _SIDE
_MOST_IMAGES = 2_000_000
_ROWS = 256
_BAD = (zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError, RuntimeError, NotImplementedError)


def entries(url: str, batch: tuple[str, int], start: int, stop: int) -> Iterator[Sample]:
    """Images of a batch file from `start` to `stop`; rows before `start` are passed over, not kept.

    Args:
        url: The file: `data`, uint8 of shape (n, 12288) with red, green and blue planes, and `labels` from 1.
        batch: Its name and bytes.
        start: The first image to give.
        stop: Where to stop.
    """
    stem = PurePosixPath(batch[0]).stem
    try:
        with open_seekable(url) as file, open_zip(file, url) as archive:
            labels = _labels(archive, url)
            with archive.open("data.npy") as rows:
                count = _rows(rows, url)
                if len(labels) != count:
                    raise DataError(f"{url} has {count} images, but {len(labels)} labels: download it again")
                rows.seek(start * _PIXELS, 1)
                for first in range(start, stop, _ROWS):
                    wanted = min(_ROWS, stop - first)
                    block = np.frombuffer(rows.read(wanted * _PIXELS), np.uint8)
                    images = block.reshape(wanted, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
                    for index, image in enumerate(images, start=first):
                        yield Sample(key=f"{stem}-{index:06d}", image=image, label=int(labels[index]) - 1)
    except _BAD as error:
        raise DataError(f"cannot read {url} ({type(error).__name__}: {error}): download it again") from error


def batches(
    listing: Mapping[str, int], root: str
) -> tuple[dict[str, list[Stretch]], dict[str, tuple[int, ...]], tuple[str, ...]]:
    """The batches of each split, in the official order; images of each class; notes for the user."""
    found: dict[str, dict[int, Stretch]] = {"train": {}, "test": {}}
    classes = len(facts("imagenet64").class_names)
    counts = {split: np.zeros(classes, np.int64) for split in found}
    others: list[str] = []
    for path, size in listing.items():
        name = PurePosixPath(path).name
        match = BATCH.fullmatch(name)
        if match is None:
            others.append(path)
            continue
        split, number = ("test", 0) if match["val"] else ("train", int(match["number"]))
        if number in found[split]:
            raise DataError(f"{root} holds {name} twice, the second time as {path}: remove one")
        url = store.join(root, path)
        try:
            with open_seekable(url) as file, open_zip(file, url) as archive:
                counts[split] += np.bincount(_labels(archive, url) - 1, minlength=classes)
                with archive.open("data.npy") as rows:
                    count = _rows(rows, url)
        except _BAD as error:
            raise DataError(f"cannot read {url} ({type(error).__name__}: {error}): download it again") from error
        found[split][number] = Stretch(kind="npz", images=(name, size), count=count, read=partial(entries, url))
    train = found["train"]
    if sorted(train) != list(range(1, len(train) + 1)) or not train:
        raise DataError(f"{root} holds the training batches {sorted(train)}: some are missing; download them too")
    notes = () if found["test"] else ("there is no val_data.npz, so the set has no test split",)
    notes += (f"left out {len(others):,} files that are no batches: {named(others, 3)}",) if others else ()
    stretches = {split: [batches[n] for n in sorted(batches)] for split, batches in found.items() if batches}
    return stretches, {split: tuple(counts[split].tolist()) for split in stretches}, notes


def _rows(file: IO[bytes], where: str) -> int:
    """Number of images of a `data` array; `file` is left where they begin."""
    old = npy.read_magic(file) == (1, 0)
    shape, by_columns, dtype = npy.read_array_header_1_0(file) if old else npy.read_array_header_2_0(file)
    if dtype != np.uint8 or by_columns or len(shape) != 2 or shape[1] != _PIXELS or not 0 < shape[0] <= _MOST_IMAGES:
        raise DataError(
            f"{where}: data is {dtype} of shape {shape}, not uint8 of shape (n, {_PIXELS}): it is no batch of "
            "ImageNet-64; those for 8, 16 and 32 px have the same names"
        )
    return shape[0]


def _labels(archive: zipfile.ZipFile, where: str) -> NDArray[np.int64]:
    classes = len(facts("imagenet64").class_names)
    if archive.getinfo("labels.npy").file_size > 16 * _MOST_IMAGES:
        raise DataError(f"{where}: labels.npy has {archive.getinfo('labels.npy').file_size} bytes, which is too many")
    with archive.open("labels.npy") as file:
        labels = npy.read_array(file, allow_pickle=False)
    whole = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer) and labels.size > 0
    if not whole or labels.min() < 1 or labels.max() > classes:
        raise DataError(f"{where}: its labels are not whole numbers from 1 to {classes}: download it again")
    return labels.astype(np.int64)
