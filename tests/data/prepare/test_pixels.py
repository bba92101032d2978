"""Centre crop and area resize: exact, and nothing is decoded that is too large."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.prepare.pixels import area_resized, square


def file_of(image: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=form)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(("n", "size"), [(7, 3), (9, 3), (10, 7), (5, 1), (8, 8), (13, 12)])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_each_pixel_is_the_mean_of_its_area(n: int, size: int, channels: tuple[int, ...]) -> None:
    image = noise(n, n, *channels)
    # Each pixel as size x size smaller ones, of which n x n make a new pixel.
    fine = image.astype(np.int64).repeat(size, 0).repeat(size, 1)
    sums = fine.reshape(size, n, size, n, *channels).sum((1, 3))
    assert np.array_equal(area_resized(image, size), (2 * sums + n * n) // (2 * n * n))


def test_the_middle_is_cut_out() -> None:
    wide = noise(6, 11, 3)
    assert np.array_equal(square(file_of(wide), 6, 3, "a"), wide[:, 2:8])
    tall = noise(13, 6)
    assert np.array_equal(square(file_of(tall), 3, 1, "a"), area_resized(tall[3:9], 3))


def test_other_colour_spaces_are_converted() -> None:
    grey = noise(4, 4)
    assert np.array_equal(square(file_of(grey), 4, 3, "a"), np.stack([grey] * 3, axis=2))
    opaque = np.dstack([noise(4, 4, 3), np.full((4, 4), 255, np.uint8)])
    assert np.array_equal(square(file_of(opaque), 4, 3, "a"), opaque[..., :3])


def bomb(side: int) -> bytes:
    """A PNG file of a few bytes that claims side x side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        (file_of(noise(5, 9, 3)), "9x5 pixels are fewer than 6x6"),
        (bomb(9_000), "9000x9000 pixels are more than the"),
        (bomb(60_000), "no readable"),
        (bomb(100), "no readable"),
        (file_of(noise(40, 40, 3))[:-200], "no readable"),
        (file_of(noise(8, 8, 3), "TIFF"), "no readable"),
        (b"", "no readable"),
    ],
)
def test_what_cannot_be_used_is_named(payload: bytes, problem: str) -> None:
    with pytest.raises(DataError, match=rf"^the/image\.png: {problem}"):
        square(payload, 6, 3, "the/image.png")
