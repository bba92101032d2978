"""An image file of any size -> square uint8 pixels: cut, padded or stretched, then resized by a stated filter."""

import io
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from data.errors import DataError
from data.prepare import colours
from data.prepare.pack import EXACT_FORMS, Form

_SUFFIXES = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
    "QOI": (".qoi",),
    "PCX": (".pcx",),
}
"""Kinds of file that may be read, by Pillow's names: none of these runs another program, as EPS does."""

# What is too large for them is an error here, with a message of its own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
Image.init()
FORMATS = tuple(kind for kind in _SUFFIXES if kind in Image.OPEN)
"""Those that this Pillow can read."""

IMAGE_SUFFIXES = frozenset(suffix for kind in FORMATS for suffix in _SUFFIXES[kind])
"""Of the files that a source takes for images, in lower case."""

LARGEST_FILE = 64 * 2**20
"""Bytes of the largest image file that is read."""

MOST_PIXELS = 64 * 2**20
"""Pixels of the largest image that is decoded."""

_MOST_PIXELS_OF = {"WEBP": 32 * 2**20, "AVIF": 48 * 2**20, "JPEG2000": 24 * 2**20}
"""Of kinds whose decoders take 10 to 20 bytes for each."""

TOO_SMALL = "pixels are fewer than"

_MODES = {1: "L", 3: "RGB"}
_LARGE = 16 * 2**20
_PIECE = 2**20
"""Pixels of a larger image that are converted and summed at a time."""
_FINER = 4
"""A large JPEG is decoded at a scale at which it still has this many times the pixels wanted, each way."""

Lines = Callable[[int, int], NDArray[np.integer]]
"""Lines of an image from one to another (not included), of shape (n, width) or (n, width, 3)."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of an image."""


def _area(lines: Lines, count: int, size: int, at_once: int) -> NDArray[np.int64]:
    """Sums of `count` lines over `size` equal stretches of them, times size / count; so many stretches at a time.

    Stretches end between lines where they must: a line cut in two counts in proportion, in whole numbers of 1/size.
    """
    found: list[NDArray[np.int64]] = []
    for start in range(0, size, at_once):
        whole, part = np.divmod(np.arange(start, min(start + at_once, size) + 1) * count, size)
        first, last = int(whole[0]), int(whole[-1])
        block = lines(first, last + bool(part[-1]))
        weight = part.reshape(-1, *[1] * (block.ndim - 1))
        sums = np.add.reduceat(block[: last - first], whole[:-1] - first, axis=0, dtype=np.int64) * size
        cut = weight[:-1] * block[whole[:-1] - first].astype(np.int64)
        sums -= cut
        sums[:-1] += cut[1:]
        if part[-1]:
            sums[-1] += part[-1] * block[-1].astype(np.int64)
        found.append(sums)
    return found[0] if len(found) == 1 else np.concatenate(found)


def area_resized(lines: Lines, box: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
    """An image with each new pixel the mean of the area it covers.

    All sums are of whole numbers, and halves round up, so the result does not depend on the machine.

    Args:
        lines: Its pixels.
        box: Its width and height.
        size: Width and height wanted, at most as much.
    """
    (width, height), (columns, rows) = box, size
    across = _area(lines, height, rows, max(1, rows * _PIECE // (width * height))).swapaxes(0, 1)
    sums = _area(lambda first, last: across[first:last], width, columns, columns).swapaxes(0, 1)
    covered = width * height
    return ((2 * sums + covered) // (2 * covered)).astype(np.uint8)


def _resized(piece: Image.Image, size: tuple[int, int], form: Form) -> NDArray[np.uint8]:
    """A plain image resized by a filter of Pillow: the one that was chosen, or bicubic where area cannot enlarge."""
    resample = Image.Resampling.LANCZOS if form.filter == "lanczos" else Image.Resampling.BICUBIC
    return np.asarray(piece.resize(size, resample))


def _halved(piece: Image.Image, size: int) -> NDArray[np.uint8]:
    """As guided-diffusion makes its 64 px: halved as often as it can be, then bicubic, then cut to the middle."""
    while min(piece.size) >= 2 * size:
        piece = piece.resize((piece.width // 2, piece.height // 2), Image.Resampling.BOX)
    scale = size / min(piece.size)
    piece = piece.resize((round(piece.width * scale), round(piece.height * scale)), Image.Resampling.BICUBIC)
    top, left = (piece.height - size) // 2, (piece.width - size) // 2
    return np.asarray(piece)[top : top + size, left : left + size]


def _places(form: Form, width: int, height: int) -> tuple[Box, tuple[int, int]]:
    """The part of an image that is used, and the width and height it gets."""
    size, longer, side = form.resolution, max(width, height), min(width, height)
    if form.fit == "pad":
        wanted = (max(1, (2 * extent * size + longer) // (2 * longer)) for extent in (width, height))
        return (0, 0, width, height), (next(wanted), next(wanted))
    if form.fit in ("stretch", "edm-ffhq64"):
        return (0, 0, width, height), (size, size)
    left, top = (width - side) // 2, (height - side) // 2
    return (left, top, left + side, top + side), (size, size)


def _check_size(form: Form, width: int, height: int, where: str) -> set[str]:
    """Whether an image is of a size that can be used; what will be done with it that its owner should know."""
    size = form.resolution
    (left, top, right, bottom), (columns, rows) = _places(form, width, height)
    if form.fit == "none" and (width, height) != (size, size):
        raise DataError(f"{where}: {width}x{height} pixels are not {size}x{size}, and --fit none changes no size")
    if columns <= right - left and rows <= bottom - top:
        return set()
    if not form.enlarge:
        raise DataError(f"{where}: {width}x{height} {TOO_SMALL} {size}x{size}")
    return {colours.ENLARGED}


def _fitted(image: Image.Image, plain: Callable[[Image.Image], Image.Image], form: Form) -> NDArray[np.uint8]:
    """Pixels of a loaded upright image; `plain` makes any piece of it grey or RGB."""
    (left, top, right, bottom), size = _places(form, *image.size)
    box = right - left, bottom - top
    if form.fit == "adm-imagenet64":
        return _halved(plain(image), form.resolution)
    if form.filter != "area" or form.fit in EXACT_FORMS or size[0] > box[0] or size[1] > box[1]:
        lanczos = replace(form, filter="lanczos") if form.fit in EXACT_FORMS else form
        return _resized(plain(image.crop((left, top, right, bottom))), size, lanczos)
    if box[0] * box[1] > _PIECE:
        return area_resized(
            lambda first, last: np.asarray(plain(image.crop((left, top + first, right, top + last)))), box, size
        )
    pixels = np.asarray(plain(image if box == image.size else image.crop((left, top, right, bottom))))
    return pixels if size == box else area_resized(lambda first, last: pixels[first:last], box, size)


def square(payload: bytes, form: Form, where: str) -> tuple[NDArray[np.uint8], set[str]]:
    """Pixels of shape (resolution, resolution) or (resolution, resolution, 3) of an image file, and remarks on it.

    Beside the file it takes at most 600 MiB of memory, whatever the image; half of that if it need not be turned and
    the filter is area; little for a JPEG, which is decoded at a smaller scale if it is large.

    Args:
        payload: The file.
        form: What is wanted; an image that is too small for it is a DataError.
        where: The file's name, for messages.
    """
    mode, exact = _MODES[form.channels], form.fit in EXACT_FORMS
    try:
        with Image.open(io.BytesIO(payload), formats=FORMATS) as image:
            width, height = image.size
            if width * height > (most := _MOST_PIXELS_OF.get(image.format or "", MOST_PIXELS)):
                raise DataError(
                    f"{where}: {width}x{height} pixels are more than the {most} that are decoded of such a file: "
                    "save it smaller"
                )
            if width * height > _LARGE and not exact:
                image.draft(image.mode, (_FINER * form.resolution, _FINER * form.resolution))
            remarks: set[str] = set()
            plain = colours.reader(image, mode, form.background, remarks, profiles=not exact)
            turn = None if exact else colours.turn_of(image)
            upright: Image.Image = image
            if turn is not None:
                upright = image.transpose(turn)
                remarks.add(colours.TURNED)
            remarks |= _check_size(form, *upright.size, where)
            return _padded(_fitted(upright, plain, form), form), remarks
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers of damaged files raise anything
        problem = str(error).replace(" <_io.BytesIO object", "").split(" at 0x")[0]
        raise DataError(f"{where}: no readable image ({problem})") from error


def _padded(pixels: NDArray[np.uint8], form: Form) -> NDArray[np.uint8]:
    """The pixels in the middle of a square of the background's colour, if they are not a square themselves."""
    size = form.resolution
    if pixels.shape[:2] == (size, size):
        return pixels
    ground = Image.new("RGB", (size, size), ImageColor.getrgb(form.background)[:3]).convert(_MODES[form.channels])
    whole = np.array(ground)
    height, width = pixels.shape[:2]
    top, left = (size - height) // 2, (size - width) // 2
    whole[top : top + height, left : left + width] = pixels
    return whole
