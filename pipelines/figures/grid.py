"""Grids of images with a caption a row, and files of pictures."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from bcm.types import Images, to_uint8
from data import store
from pipelines.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION_WIDTH = 150
LINE = 16
GAP = 3
PICTURE_WIDTH, LARGEST_TILE = 1500, 128
"""Small images are enlarged up to these, in pixels of the picture."""
MOST_PIXELS = 100_000_000
"""A larger picture is opened by few programs."""
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""What a picture's name may end in."""


@dataclass(frozen=True)
class Row:
    """One row of a grid."""

    caption: str
    """What the images are; lines are split at newlines."""
    images: Images
    """(B, C, H, W) in [-1, 1]."""
    labels: Sequence[int] | None = None
    """Their classes, B of them, as far as the model was told."""


def columns_for(rows: int, count: int) -> int:
    """Images side by side, of `count` in each of `rows` rows that are broken alike, for a near square picture."""

    def stretch(breaks: int) -> float:
        aspect = -(-count // breaks) / (rows * breaks)
        return max(aspect, 1 / aspect)

    return -(-count // min(range(1, count + 1), key=stretch))


def grid(rows: Sequence[Row]) -> Image.Image:
    """Draw rows of images, enlarged without smoothing, captions on the left; long rows are broken, all at one place."""
    count, resolution = max(len(row.images) for row in rows), rows[0].images.shape[-1]
    columns = columns_for(len(rows), count)
    size = max(min(LARGEST_TILE, PICTURE_WIDTH // columns) // resolution, 1) * resolution
    parts = [row.images[start : start + columns] for start in range(0, count, columns) for row in rows]
    width, height = CAPTION_WIDTH + columns * (size + GAP) + GAP, len(parts) * (size + GAP) + GAP
    if width * height > MOST_PIXELS:
        raise ConfigError(
            f"{count} images make a picture of {width}x{height} pixels. Write files: --format png or npz."
        )
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, images in enumerate(parts):
        top = GAP + i * (size + GAP)
        if i < len(rows) or len(rows) > 1:  # of a single row that is broken, the first line alone says it
            caption = rows[i % len(rows)].caption
            lift = LINE * len(caption.split("\n"))
            draw.multiline_text((6, top + (size - lift) / 2), caption, fill="black", font_size=13)
        for j, pixels in enumerate(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):
            tile = Image.fromarray(np.squeeze(pixels, -1) if pixels.shape[-1] == 1 else pixels)
            tile = tile.resize((size, size), Image.Resampling.NEAREST)
            canvas.paste(tile, (CAPTION_WIDTH + GAP + j * (size + GAP), top))
    return canvas


def noise_as_image(x_T: Images, T: float) -> Images:
    """Noise of standard deviation T in the range of images, for looking at."""
    return (x_T / T / 3).clamp(-1, 1)


def picture_format(out: str) -> str:
    """The format that the name of a picture asks for; a name without one that is known is a `ConfigError`."""
    suffix = PurePosixPath(out).suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(f"--out {out}: the name of a picture ends in {', '.join(FORMATS)}.")
    return FORMATS[suffix]


def save(picture: "Image.Image | Figure", out: str) -> None:
    """Write a picture to a path or URL whole or not at all, making its folder, in the format that its name asks for."""
    write, buffer = picture.save if isinstance(picture, Image.Image) else picture.savefig, io.BytesIO()
    write(buffer, format=picture_format(out))
    store.write_bytes(out, buffer.getvalue())
