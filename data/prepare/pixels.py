"""An image file of any size -> square uint8 pixels: centre crop, then area resize, exact on every machine."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".ppm", ".pgm", ".bmp"})
"""Of the files that a source takes for images, in lower case."""

LARGEST_FILE = 64 * 2**20
"""Bytes of the largest image file that is read."""

_FORMATS = ("PNG", "JPEG", "WEBP", "PPM", "BMP")
_MOST_PIXELS = 64 * 2**20
_MODES = {1: "L", 3: "RGB"}


def _area(image: NDArray[np.integer], size: int) -> NDArray[np.int64]:
    """Sums of an image of shape (n, ...) over `size` equal stretches of its first axis, times size / n.

    Stretches end between pixels where they must: a pixel cut in two counts in proportion, in whole numbers of 1/size.
    """
    whole, part = np.divmod(np.arange(size + 1) * len(image), size)
    weight = part.reshape(-1, *[1] * (image.ndim - 1))
    cut = weight[:-1] * image[whole[:-1]].astype(np.int64)
    sums = np.add.reduceat(image, whole[:-1], axis=0, dtype=np.int64) * size - cut
    sums[:-1] += cut[1:]
    return sums


def area_resized(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """A square image of shape (n, n) or (n, n, C), n >= size, with each new pixel the mean of the area it covers.

    All sums are of whole numbers, and halves round up, so the result does not depend on the machine.
    """
    n = len(image)
    if n == size:
        return image
    rows = _area(image, size)
    sums = _area(rows.swapaxes(0, 1), size).swapaxes(0, 1)
    return ((2 * sums + n * n) // (2 * n * n)).astype(np.uint8)


def square(payload: bytes, resolution: int, channels: int, where: str) -> NDArray[np.uint8]:
    """Pixels of shape (resolution, resolution) or (resolution, resolution, 3) of an image file.

    Args:
        payload: The file.
        resolution: Height and width wanted; a smaller image is a DataError.
        channels: 1 (grey) or 3 (RGB); other colour spaces are converted.
        where: The file's name, for messages.
    """
    try:
        with Image.open(io.BytesIO(payload), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > _MOST_PIXELS:
                raise DataError(f"{where}: {width}x{height} pixels are more than the {_MOST_PIXELS} that are decoded")
            side = min(width, height)
            if side < resolution:
                raise DataError(f"{where}: {width}x{height} pixels are fewer than {resolution}x{resolution}")
            pixels = np.asarray(image.convert(_MODES[channels]))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        problem = str(error).replace(" <_io.BytesIO object", "").split(" at 0x")[0]
        raise DataError(f"{where}: no readable PNG, JPEG, WebP, PPM or BMP image ({problem})") from error
    top, left = (height - side) // 2, (width - side) // 2
    return area_resized(pixels[top : top + side, left : left + side], resolution)
