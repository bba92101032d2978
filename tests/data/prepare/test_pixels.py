"""From a file to a square of a size: exact in every form, and nothing is decoded that is too large."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.prepare import pixels
from data.prepare.pack import Fit, Form
from data.prepare.pixels import square

ROOT = Path(__file__).resolve().parents[3]


def file_of(image: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=form)
    return buffer.getvalue()


def made(payload: bytes, size: int, channels: int = 3, **more: Any) -> np.ndarray:
    return square(payload, Form(resolution=size, channels=channels, encoding="raw", **more), "a")[0]


def area_resized(image: np.ndarray, columns: int, rows: int) -> np.ndarray:
    """By the definition: each pixel as columns x rows smaller ones, of which width x height make a new pixel."""
    height, width, *channels = image.shape
    fine = image.astype(np.int64).repeat(rows, 0).repeat(columns, 1)
    sums = fine.reshape(rows, height, columns, width, *channels).sum((1, 3))
    return (2 * sums + width * height) // (2 * width * height)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(7, 7, 3), (9, 9, 3), (10, 10, 7), (5, 9, 1), (8, 8, 8), (13, 20, 12), (40, 13, 5)]
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("piece", [2**20, 1])
def test_each_pixel_is_the_mean_of_its_area(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int, size: int, channels: int, piece: int
) -> None:
    monkeypatch.setattr(pixels, "_PIECE", piece)  # large images are read piece by piece
    image = noise(height, width, *[3] * (channels == 3))
    assert np.array_equal(made(file_of(image), size, channels, fit="stretch"), area_resized(image, size, size))


def test_the_middle_is_cut_out() -> None:
    wide = noise(6, 11, 3)
    assert np.array_equal(made(file_of(wide), 6), wide[:, 2:8])
    tall = noise(13, 6)
    assert np.array_equal(made(file_of(tall), 3, 1), area_resized(tall[3:9], 3, 3))


def test_a_padded_image_is_whole_and_in_the_middle() -> None:
    wide = noise(10, 30, 3)
    padded = made(file_of(wide), 15, fit="pad", background="#0a1400")
    assert np.array_equal(padded[5:10], area_resized(wide, 15, 5))
    ground = np.concatenate([padded[:5], padded[10:]])
    assert (ground == (10, 20, 0)).all()
    tall = made(file_of(wide.swapaxes(0, 1)), 15, fit="pad", background="#0a1400")
    assert np.array_equal(tall, padded.swapaxes(0, 1))
    assert made(file_of(noise(1, 200, 3)), 4, fit="pad").shape == (4, 4, 3), "a line is never of no pixels"


@pytest.mark.parametrize("name", ["lanczos", "bicubic"])
def test_other_filters_are_those_of_pillow(name: str) -> None:
    image = noise(40, 52, 3)
    resample = Image.Resampling[name.upper()]
    cut = Image.fromarray(image[:, 6:46]).resize((16, 16), resample)
    assert np.array_equal(made(file_of(image), 16, filter=name), np.asarray(cut))
    whole = Image.fromarray(image).resize((16, 16), resample)
    assert np.array_equal(made(file_of(image), 16, filter=name, fit="stretch"), np.asarray(whole))


def test_a_small_image_is_refused_or_enlarged_as_one_says() -> None:
    small = file_of(noise(5, 9, 3))
    for fit in ("crop", "stretch", "adm-imagenet64"):
        size = 64 if "64" in fit else 6
        with pytest.raises(DataError, match=f"9x5 pixels are fewer than {size}x{size}"):
            made(small, size, fit=fit)
    assert made(small, 6, fit="pad").shape == (6, 6, 3), "its longer side is long enough"
    large, remarks = square(small, Form(resolution=20, channels=3, encoding="raw", enlarge=True), "a")
    wanted = Image.fromarray(noise(5, 9, 3)[:, 2:7]).resize((20, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(large, np.asarray(wanted)) and remarks == {"are enlarged"}


def test_without_a_fit_an_image_must_be_of_the_size() -> None:
    assert np.array_equal(made(file_of(noise(6, 6, 3)), 6, fit="none"), noise(6, 6, 3))
    for shape in ((6, 7), (7, 7), (5, 5)):
        with pytest.raises(DataError, match="are not 6x6, and --fit none changes no size"):
            made(file_of(noise(*shape, 3)), 6, fit="none")


def by_edm(image: np.ndarray, crop: bool) -> np.ndarray:
    """What EDM's dataset_tool.py does at --resolution=64x64, with and without --transform=center-crop."""
    height, width = image.shape[:2]
    side = min(height, width)
    if crop:
        rows = slice((height - side) // 2, (height + side) // 2)
        image = image[rows, (width - side) // 2 : (width + side) // 2]
    return np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.LANCZOS))


def by_adm(image: np.ndarray) -> np.ndarray:
    """What guided-diffusion's loader does for images of 64 px without augmentation."""
    picture = Image.fromarray(image)
    while min(picture.size) >= 128:
        picture = picture.resize((picture.size[0] // 2, picture.size[1] // 2), resample=Image.Resampling.BOX)
    ratio = 64 / min(picture.size)
    wanted = [round(extent * ratio) for extent in picture.size]
    values = np.array(picture.resize((wanted[0], wanted[1]), resample=Image.Resampling.BICUBIC))
    y, x = (values.shape[0] - 64) // 2, (values.shape[1] - 64) // 2
    return values[y : y + 64, x : x + 64]


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (64, 64), (127, 300), (128, 129), (1024, 1024)])
def test_named_forms_are_exactly_those_of_the_reference_statistics(shape: tuple[int, int]) -> None:
    image = noise(*shape, 3)
    forms: dict[Fit, np.ndarray] = {
        "edm-imagenet64": by_edm(image, crop=True),
        "edm-ffhq64": by_edm(image, crop=False),
        "adm-imagenet64": by_adm(image),
    }
    for fit, wanted in forms.items():
        assert np.array_equal(made(file_of(image), 64, fit=fit), wanted), fit
    with pytest.raises(DataError, match="edm-imagenet64 is a form of 64 px, not 32"):
        made(file_of(image), 32, fit="edm-imagenet64")


def test_a_large_jpeg_is_decoded_at_a_smaller_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = np.asarray(Image.fromarray(noise(8, 8, 3)).resize((640, 640), Image.Resampling.BICUBIC))
    payload = file_of(smooth, "JPEG")
    exact = made(payload, 16).astype(int)
    monkeypatch.setattr(pixels, "_LARGE", 100_000)
    assert np.abs(made(payload, 16).astype(int) - exact).max() <= 2
    assert np.array_equal(
        made(payload, 64, fit="edm-ffhq64"), by_edm(np.asarray(Image.open(io.BytesIO(payload))), False)
    )


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
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no readable"),
        (b"", "no readable"),
    ],
)
def test_what_cannot_be_used_is_named(payload: bytes, problem: str) -> None:
    with pytest.raises(DataError, match=rf"^the/image\.png: {problem}"):
        square(payload, Form(resolution=6, channels=3, encoding="raw"), "the/image.png")


PEAK = """
import resource, sys
from data.prepare.pack import Form
from data.prepare.pixels import square
payload, form = open(sys.argv[1], "rb").read(), Form(resolution=64, channels=3, encoding="raw", filter=sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
square(payload, form, "x")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "side", "options", "filter", "most"),
    [
        ("PNG", 8192, {"compress_level": 1}, "area", 320),
        ("PNG", 8192, {"compress_level": 1, "exif": True}, "area", 600),
        ("PNG", 8192, {"compress_level": 1}, "lanczos", 600),
        ("JPEG", 8192, {}, "lanczos", 60),
        ("JPEG", 8192, {"progressive": True, "subsampling": 0}, "area", 450),
        ("WEBP", 5790, {"method": 0}, "area", 600),
        ("TIFF", 8192, {"compression": "tiff_lzw"}, "area", 600),
        ("GIF", 8192, {}, "area", 600),
    ],
)
def test_the_largest_image_takes_a_bounded_amount_of_memory(
    tmp_path: Path, form: str, side: int, options: dict[str, Any], filter: str, most: int
) -> None:
    assert side**2 <= pixels.MOST_PIXELS
    if "exif" in options:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    small = Image.fromarray(noise(64, 64, 3)).convert("P" if form == "GIF" else "RGB")
    small.resize((side, side), Image.Resampling.NEAREST).save(tmp_path / "x", form, **options)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "x"), filter]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= most
