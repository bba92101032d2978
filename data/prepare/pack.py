"""Images -> WebDataset shards and their manifest, at any URL.

Shards are plain USTAR files that stock `webdataset` reads: `{key}.cls` and an image member, such as `{key}.ppm`, for
each sample. The same samples give the same bytes. The manifest is written last, so a set that was left half-written has
none and is never taken for whole.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from data.decode import LABEL_EXTENSION, raw_header
from data.errors import DataError
from data.manifest import LARGEST_RESOLUTION, Shard

SAMPLES_PER_SHARD = 1000
"""Samples in each shard but the last of a split: 3 MB of CIFAR-10."""

ENCODINGS = ("raw", "png", "webp")

Fit = Literal["crop", "pad", "stretch", "none", "edm-imagenet64", "adm-imagenet64", "edm-ffhq64"]
"""How an image becomes a square: its middle is cut out, it is laid on a ground, it is stretched, or it must be one; or
as the reference statistics of that name were made, to the pixel."""

Filter = Literal["area", "lanczos", "bicubic"]
"""How pixels are put together when an image is resized."""

EXACT_FORMS = tuple(fit for fit in get_args(Fit) if "-" in fit)
"""The forms of reference statistics; they decide the filter too, and heed neither EXIF data nor colour profiles."""
_LARGEST_RAW = 64
_REFERENCE_RESOLUTION = 64
# More effort makes files a tenth smaller, and takes twenty times as long.
_OPTIONS = {"png": {}, "webp": {"lossless": True, "method": 0, "quality": 20}}
_MODE = 0o444
# A whole number: for a fraction, and even for 0.0, the tar writer would add a header block beyond plain USTAR.
_MODIFIED = 0


@dataclass(frozen=True, eq=False)
class Sample:
    """One labelled image.

    Attributes:
        key: Its name inside the shards: unique in the split, without dots or slashes.
        image: uint8 pixels, of shape (height, width) or (height, width, 3).
        label: Its class, from 0.
    """

    key: str
    image: NDArray[np.uint8]
    label: int

    def __post_init__(self) -> None:
        """Checks what a shard could not hold."""
        if not self.key or set("./\\") & set(self.key) or not self.key.isascii() or len(self.key) > 90:
            raise DataError(f"sample key {self.key!r} must be 1 to 90 ASCII characters without dots or slashes")
        shape = self.image.shape
        if self.image.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)):
            raise DataError(
                f"sample {self.key}: image must be uint8 of shape (height, width) or (height, width, 3), "
                f"not {self.image.dtype} of shape {shape}"
            )
        if self.label < 0:
            raise DataError(f"sample {self.key}: label {self.label} is negative")


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the images of a set are kept.

    Attributes:
        resolution: Height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        encoding: "raw" (pixels behind a short header), "png" or "webp"; all three keep every pixel.
        fit: How an image becomes a square.
        filter: How it is made smaller.
        background: Colour below transparent parts and around padded images: a name or #rrggbb.
        enlarge: Whether an image that is too small is enlarged; else it is an error.
    """

    resolution: int
    channels: int
    encoding: str
    fit: Fit = "crop"
    filter: Filter = "area"
    background: str = "black"
    enlarge: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        if not 1 <= self.resolution <= LARGEST_RESOLUTION:
            raise DataError(f"resolution is {self.resolution}: give a number from 1 to {LARGEST_RESOLUTION}")
        if self.channels not in (1, 3):
            raise DataError(f"channels is {self.channels}: give 1 (grey) or 3 (RGB)")
        if self.encoding not in ENCODINGS:
            raise DataError(f"encoding {self.encoding!r} is unknown; choose from {', '.join(ENCODINGS)}")
        for option, known in ((self.fit, get_args(Fit)), (self.filter, get_args(Filter))):
            if option not in known:
                raise DataError(f"{option!r} is unknown; choose from {', '.join(known)}")
        if self.fit in EXACT_FORMS and self.resolution != _REFERENCE_RESOLUTION:
            raise DataError(f"{self.fit} is a form of {_REFERENCE_RESOLUTION} px, not {self.resolution}")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise DataError(f"background {self.background!r} is no colour: give a name or #rrggbb") from None


def default_encoding(resolution: int) -> str:
    """Raw pixels up to 64 px, where decoding would cost more than reading; WebP above."""
    return "raw" if resolution <= _LARGEST_RAW else "webp"


def pack(samples: Iterable[Sample], encoding: str) -> tuple[bytes, list[int], list[int]]:
    """The samples as one plain USTAR file, and first byte and size of each image in it.

    The same samples give the same bytes.
    """
    from webdataset.writer import TarWriter

    buffer = io.BytesIO()
    offsets: list[int] = []
    sizes: list[int] = []
    with TarWriter(buffer, user="", group="", mode=_MODE, mtime=_MODIFIED, encoder=False) as writer:
        for sample in samples:
            if encoding == "raw":
                channels = 1 if sample.image.ndim == 2 else 3
                extension = "pgm" if channels == 1 else "ppm"
                payload = raw_header(len(sample.image), channels) + sample.image.tobytes()
            else:
                extension, picture = encoding, io.BytesIO()
                Image.fromarray(sample.image).save(picture, format=encoding, **_OPTIONS[encoding])
                payload = picture.getvalue()
            writer.write({"__key__": sample.key, LABEL_EXTENSION: b"%d" % sample.label, extension: payload})
            sizes.append(len(payload))
            # The writer sorts the members of a sample by extension, so its image is the last of them.
            offsets.append(writer.tarstream.offset - -(-len(payload) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
    return buffer.getvalue(), offsets, sizes


def shard_of(path: str, payload: bytes, offsets: Sequence[int], sizes: Sequence[int]) -> Shard:
    """The entry of a packed shard for the manifest."""
    return Shard.of(path, len(payload), hashlib.sha256(payload).hexdigest(), offsets, sizes)
