"""One verified shard -> uint8 pixels and labels. Nothing in a shard is ever unpickled or run."""

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.errors import DataError
from data.manifest import Manifest, Shard
from data.tar import BLOCK, plain_members

IMAGE_EXTENSIONS = frozenset({"ppm", "pgm", "png", "jpg", "jpeg", "webp"})
"""A ppm (RGB) or pgm (grey) member is a short header and the raw pixels: nothing to decode."""
LABEL_EXTENSION = "cls"
JSON_EXTENSION = "json"
"""Read for its label where a sample has no .cls member."""
LABEL_KEYS = ("label", "class", "cls", "class_id")
"""Where a .json member or a table of labels states them; a whole number counts before a text."""
REFUSED_EXTENSIONS = frozenset(
    {"pyd", "pkl", "pickle", "pt", "pth", "npy", "npz", "joblib", "dill", "ckpt", "py", "pyc", "so"}
)
"""Kinds of member that some reader would unpickle or run."""

_FORMATS = ("PPM", "PNG", "JPEG", "WEBP")
_CHANNELS_OF_MODE = {"L": 1, "RGB": 3}
_LONGEST_LABEL = 1000
_LONGEST_JSON = 2**20
_LONGEST_IMAGE = 4 * 2**20
_AGAIN = "Write the whole set again with python -m pipelines.prepare."


def raw_header(resolution: int, channels: int) -> bytes:
    """What precedes the pixels, of shape (H, W) or (H, W, 3), in a member of raw pixels."""
    return f"P{6 if channels == 3 else 5}\n{resolution} {resolution}\n255\n".encode("ascii")


def key_and_extension(name: str, where: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the file name; what could run code is a DataError."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    if extension.lower().rpartition(".")[2] in REFUSED_EXTENSIONS:
        raise DataError(
            f"{where}: member {name!r} is refused, because files of that kind can run code when read. "
            "Write the shard again with images (.ppm, .png, .jpg, .webp) and labels (.cls) only."
        )
    return folder + slash + stem, extension.lower()


def members(tar: tarfile.TarFile, where: str) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, extension and header of each file in the tar, refusing what could run code."""
    for member in tar:
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise DataError(f"{where}: member {member.name!r} is a link or a device, not a file: write the shard again")
        yield *key_and_extension(member.name, where), member


def _files(path: Path, raw: NDArray[np.uint8], where: str) -> Iterator[tuple[str, str, int, int]]:
    """Key, extension, first byte and length of each file in the tar at `path`, whose bytes are `raw`."""
    plain = plain_members(raw)
    if plain is None:
        with tarfile.open(path, mode="r:") as tar:
            for key, extension, member in members(tar, where):
                yield key, extension, member.offset_data, member.size
    else:
        for name, offset, size in plain:
            yield *key_and_extension(name, where), offset, size


def _pixels(payload: bytes, manifest: Manifest, where: Callable[[], str]) -> NDArray[np.uint8]:
    """Pixels of shape (C, H, W); size and channels are checked before any pixel is decoded."""
    try:
        with Image.open(io.BytesIO(payload), formats=_FORMATS) as image:
            channels = _CHANNELS_OF_MODE.get(image.mode)
            wanted = (manifest.resolution, manifest.resolution, manifest.channels)
            if (image.height, image.width, channels) != wanted:
                raise DataError(
                    f"{where()}: the image is {image.height}x{image.width} with {channels or image.mode} channels, but "
                    f"the manifest states {wanted[0]}x{wanted[1]} with {wanted[2]}: resize it, then write the set again"
                )
            pixels = np.asarray(image, dtype=np.uint8)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise whatever their parsing meets
        raise DataError(
            f"{where()}: not a readable PNG, JPEG or WebP image ({error}): replace it and prepare the set again; "
            "python -m pipelines.prepare verify lists all like it"
        ) from error
    return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def plain_label(value: Any, where: str) -> str | None:
    """A label as text, a whole number (3, "3", 3.0) in plain digits; None for none, and what is neither a DataError."""
    text = "" if isinstance(value, bool | list | dict) else str(value).strip()
    if value is None:
        return None
    if match := re.fullmatch(r"(\d{1,20})(?:\.0*)?", text):
        return str(int(match[1]))
    if not text or not isinstance(value, str) or re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        raise DataError(f"{where}: label {value!r:.60} is not a whole number from 0, nor the name of a class")
    return text


def stated_label(entry: Mapping[str, Any], where: str) -> str | None:
    """The label in a JSON object or a row of a table, under one of `LABEL_KEYS`; None if there is none."""
    found = [label for key in LABEL_KEYS if (label := plain_label(entry.get(key), where)) is not None]
    numbers = {label for label in found if label.isdecimal()}
    if len(numbers) > 1:
        raise DataError(f"{where} states several labels: {', '.join(sorted(numbers))}; leave one")
    return next(iter(numbers), None) or next(iter(found), None)


def label_text(extension: str, payload: bytes, where: str) -> str | None:
    """The label in the member with this extension, as `plain_label` gives it; None if a .json one has none."""
    if extension != JSON_EXTENSION:
        return plain_label(payload[:_LONGEST_LABEL].decode("utf-8-sig", "replace"), where)
    try:
        value = json.loads(payload) if len(payload) <= _LONGEST_JSON else None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its .json member is not valid JSON: write the shard again") from error
    return stated_label(value, where) if isinstance(value, dict) else None


def label_of(extension: str, payload: bytes, classes: int, where: str) -> int | None:
    """The label, from 0 to classes - 1, in a .cls or .json member; None if a .json one has none."""
    # Nearly all are plain numbers.
    plain = extension == LABEL_EXTENSION and payload.isdigit() and len(payload) < 20
    text = payload.decode() if plain else label_text(extension, payload, where)
    if text is not None and (not text.isdecimal() or int(text) >= classes):
        raise DataError(f"{where}: label {text!r} is not a whole number from 0 to {classes - 1}: write the shard again")
    return None if text is None else int(text)


def read_labels(path: Path, url: str, shard: Shard, manifest: Manifest) -> NDArray[np.int64]:
    """Labels, of shape (n,), of the tar file at `path`, in which no image is decoded.

    The images must lie exactly where the manifest says: a tar that ends early is an error and never a shorter data set.

    Args:
        path: The local copy, already checked for length and hash.
        url: Where it came from, for messages.
        shard: Its entry in the manifest.
        manifest: The whole manifest, for the classes.
    """
    raw = mapped(path)
    stated = shard.spans.tolist()
    places: dict[str, int] = {}
    labels: dict[str, dict[str, int]] = {LABEL_EXTENSION: {}, JSON_EXTENSION: {}}
    try:
        for key, extension, offset, size in _files(path, raw, url):
            if extension in IMAGE_EXTENSIONS:
                index = len(places)
                if key in places or stated[index : index + 1] != [[offset, size]]:
                    raise DataError(
                        f"{url}: sample {key}: the manifest knows no image at byte {offset} of this shard. {_AGAIN}"
                    )
                places[key] = index
            elif extension in labels:
                payload = raw[offset : offset + size].tobytes()
                if len(payload) != size:
                    raise EOFError(f"sample {key} is cut off")
                label = label_of(extension, payload, len(manifest.class_names), f"{url}: sample {key}")
                if label is not None:
                    labels[extension][key] = label
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{url} is not a whole tar file ({error}). {_AGAIN}") from error
    if len(places) != shard.count:
        raise DataError(f"{url} holds {len(places)} images, but the manifest states {shard.count}. {_AGAIN}")
    known = labels[JSON_EXTENSION] | labels[LABEL_EXTENSION]
    if not known and len(manifest.class_names) == 1:
        known = dict.fromkeys(places, 0)
    if places.keys() != known.keys():
        odd = min(places.keys() ^ known.keys())
        raise DataError(f"{url}: sample {odd} lacks its image or its label. {_AGAIN}")
    return np.array([known[key] for key in places], dtype=np.int64)


def mapped(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, mapped read-only."""
    if path.stat().st_size == 0:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r").view(np.ndarray)


def decode_images(raw: NDArray[np.uint8], spans: NDArray[np.int64], manifest: Manifest, url: str) -> NDArray[np.uint8]:
    """Images of shape (n, C, H, W) whose first byte and length, of shape (n, 2), in the bytes of a tar are given."""
    shape = (len(spans), manifest.channels, manifest.resolution, manifest.resolution)
    if (images := _raw_images(raw, spans, shape)) is not None:
        return images
    images = np.empty(shape, dtype=np.uint8)
    for index, (offset, size) in enumerate(spans.tolist()):
        if size > _LONGEST_IMAGE + 8 * images[index].size:
            raise DataError(f"{_sample_at(raw, offset, url)}: the image has {size} bytes, too many for its size")
        images[index] = _pixels(raw[offset : offset + size].tobytes(), manifest, partial(_sample_at, raw, offset, url))
    return images


def _raw_images(
    raw: NDArray[np.uint8], spans: NDArray[np.int64], shape: tuple[int, int, int, int]
) -> NDArray[np.uint8] | None:
    """The images, if all are raw pixels behind the header they must have; nothing is done for each image alone."""
    count, channels, height, width = shape
    offsets, sizes = spans.T
    header = np.frombuffer(raw_header(height, channels), np.uint8)
    blocks = -(-(len(header) + channels * height * width) // BLOCK)
    last = int(offsets.max(initial=0)) // BLOCK + blocks
    if (sizes != len(header) + channels * height * width).any() or (offsets % BLOCK).any() or last * BLOCK > len(raw):
        return None
    places = (offsets // BLOCK)[:, np.newaxis] + np.arange(blocks)
    rows = raw[: last * BLOCK].reshape(-1, BLOCK)[places].reshape(count, blocks * BLOCK)
    if (rows[:, : len(header)] != header).any():
        return None
    pixels = rows[:, len(header) : len(header) + channels * height * width]
    return np.ascontiguousarray(pixels.reshape(count, height, width, channels).transpose(0, 3, 1, 2))


def _sample_at(raw: NDArray[np.uint8], offset: int, url: str) -> str:
    """Names, for a message, the sample whose image begins at a byte: its header lies just before."""
    name = raw[offset - BLOCK : offset - BLOCK + 100].tobytes().partition(b"\0")[0].decode("utf-8", "replace")
    folder, slash, file = name.rpartition("/")
    return f"{url}: sample {folder}{slash}{file.partition('.')[0]}"


def decode_shard(path: Path, url: str, shard: Shard, manifest: Manifest) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of shape (n, C, H, W) and labels of shape (n,) of the tar file at `path`; see `read_labels`."""
    labels = read_labels(path, url, shard, manifest)
    return decode_images(mapped(path), shard.spans, manifest, url), labels
