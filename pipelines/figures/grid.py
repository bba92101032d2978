"""Grids of images with a caption a row, and PNG files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from bcm.types import Images, to_uint8
from pipelines.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION_WIDTH = 150
LINE = 16


@dataclass(frozen=True)
class Row:
    """One row of a grid."""

    caption: str
    """What the images are; lines are split at newlines."""
    images: Images
    """(B, C, H, W) in [-1, 1]."""


def grid(rows: Sequence[Row], side: int = 48, gap: int = 3) -> Image.Image:
    """Draw rows of images, each enlarged without smoothing to about `side` pixels, captions on the left."""
    columns = max(len(row.images) for row in rows)
    size = max(side // rows[0].images.shape[-1], 1) * rows[0].images.shape[-1]
    canvas = Image.new("RGB", (CAPTION_WIDTH + columns * (size + gap) + gap, len(rows) * (size + gap) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        top = gap + i * (size + gap)
        lines = row.caption.split("\n")
        draw.multiline_text((6, top + (size - LINE * len(lines)) / 2), row.caption, fill="black", font_size=13)
        for j, pixels in enumerate(to_uint8(row.images).permute(0, 2, 3, 1).cpu().numpy()):
            tile = Image.fromarray(np.squeeze(pixels)).resize((size, size), Image.Resampling.NEAREST)
            canvas.paste(tile, (CAPTION_WIDTH + gap + j * (size + gap), top))
    return canvas


def noise_as_image(x_T: Images, T: float) -> Images:
    """Noise of standard deviation T in the range of images, for looking at."""
    return (x_T / T / 3).clamp(-1, 1)


def save(picture: "Image.Image | Figure", path: Path) -> None:
    """Write a PNG, making its folder; a place that cannot be written is a `ConfigError`."""
    write = picture.save if isinstance(picture, Image.Image) else picture.savefig
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, format="png")
    except OSError as error:
        cause = error.strerror or error
        raise ConfigError(f"cannot write the picture {path}: {cause}. Choose another --out.") from error
