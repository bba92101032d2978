"""One verified shard -> uint8 pixels and labels. Nothing in a shard is ever unpickled or run."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data.errors import DataError
from data.manifest import Manifest, Shard

IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp"})
LABEL_EXTENSION = "cls"
REFUSED_EXTENSIONS = frozenset(
    {"pyd", "pkl", "pickle", "pt", "pth", "npy", "npz", "joblib", "dill", "ckpt", "py", "pyc", "so"}
)
"""Kinds of member that some reader would unpickle or run."""

_FORMATS = ("PNG", "JPEG", "WEBP")
_CHANNELS_OF_MODE = {"L": 1, "RGB": 3}
_LONGEST_LABEL = 20
_AGAIN = "Write the whole set again with python -m pipelines.prepare."


def _key_and_extension(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the file name, the rest is the extension."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _members(tar: tarfile.TarFile, where: str) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, extension and header of each file in the tar, refusing what could run code."""
    for member in tar:
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise DataError(f"{where}: member {member.name!r} is a link or a device, not a file: write the shard again")
        key, extension = _key_and_extension(member.name)
        if extension.rpartition(".")[2] in REFUSED_EXTENSIONS:
            raise DataError(
                f"{where}: member {member.name!r} is refused, because files of that kind can run code when read. "
                "Write the shard again with images (.png, .jpg, .webp) and labels (.cls) only."
            )
        yield key, extension, member


def _pixels(payload: bytes, manifest: Manifest, where: str) -> NDArray[np.uint8]:
    """Pixels of shape (C, H, W); size and channels are checked before any pixel is decoded."""
    try:
        with Image.open(io.BytesIO(payload), formats=_FORMATS) as image:
            channels = _CHANNELS_OF_MODE.get(image.mode)
            wanted = (manifest.resolution, manifest.resolution, manifest.channels)
            if (image.height, image.width, channels) != wanted:
                raise DataError(
                    f"{where}: the image is {image.height}x{image.width} with {channels or image.mode} channels, but "
                    f"the manifest states {wanted[0]}x{wanted[1]} with {wanted[2]}: resize it, then write the set again"
                )
            pixels = np.asarray(image, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not a readable PNG, JPEG or WebP image ({error}): write the shard again") from error
    return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _label(payload: bytes, manifest: Manifest, where: str) -> int:
    text = payload[:_LONGEST_LABEL].decode("ascii", "replace").strip()
    classes = len(manifest.class_names)
    if len(payload) > _LONGEST_LABEL or not text.isdecimal() or not 0 <= int(text) < classes:
        raise DataError(f"{where}: label {text!r} is not a whole number from 0 to {classes - 1}: write the shard again")
    return int(text)


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    payload = file.read(member.size)
    if len(payload) != member.size:
        raise EOFError(f"member {member.name!r} is cut off")
    return payload


def decode_shard(path: Path, url: str, shard: Shard, manifest: Manifest) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of shape (n, C, H, W) and labels of shape (n,) of the tar file at `path`.

    The images must lie exactly where the manifest says: a tar that ends early is an error and never a shorter data set.

    Args:
        path: The local copy, already checked for length and hash.
        url: Where it came from, for messages.
        shard: Its entry in the manifest.
        manifest: The whole manifest, for size, channels and classes.
    """
    images = np.empty((shard.count, manifest.channels, manifest.resolution, manifest.resolution), dtype=np.uint8)
    places: dict[str, int] = {}
    labels: dict[str, int] = {}
    try:
        with path.open("rb") as file, tarfile.open(path, mode="r:") as tar:
            for key, extension, member in _members(tar, url):
                where = f"{url}: sample {key}"
                if extension in IMAGE_EXTENSIONS:
                    index = len(places)
                    stated = (shard.offsets[index], shard.sizes[index]) if index < shard.count else None
                    if key in places or stated != (member.offset_data, member.size):
                        raise DataError(
                            f"{where}: the manifest knows no image at byte {member.offset_data} of this shard. {_AGAIN}"
                        )
                    images[index] = _pixels(_content(file, member), manifest, where)
                    places[key] = index
                elif extension == LABEL_EXTENSION:
                    labels[key] = _label(_content(file, member), manifest, where)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{url} is not a whole tar file ({error}). {_AGAIN}") from error
    if len(places) != shard.count:
        raise DataError(f"{url} holds {len(places)} images, but the manifest states {shard.count}. {_AGAIN}")
    if places.keys() != labels.keys():
        odd = min(places.keys() ^ labels.keys())
        raise DataError(f"{url}: sample {odd} lacks its image or its label. {_AGAIN}")
    return images, np.array([labels[key] for key in places], dtype=np.int64)
