"""Pixels as the file means them: which way is up, deep grey, transparency, colour profiles; in every kind of source."""

import io
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from made import cached_split
from PIL import Image, ImageCms, ImageOps

from data.errors import DataError
from data.prepare import Choices, colours, prepare
from data.prepare.pack import Form
from data.prepare.pixels import square

SIDE = 16
GROUND = (10, 20, 200)
FORM = Form(resolution=SIDE, channels=3, encoding="raw", background="#0a14c8")
RGB = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
GREY = RGB[..., 0]
DEEP = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
HOLES = np.random.default_rng(1).integers(0, 2, (SIDE, SIDE)).astype(bool)


@dataclass(frozen=True)
class Case:
    """A file, the pixels it means, how far from them one may be, and what is said of it."""

    payload: bytes
    pixels: np.ndarray
    near: int = 0
    remark: str = ""


def saved(image: Image.Image | np.ndarray, form: str = "PNG", **more: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **more)
    return buffer.getvalue()


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def png(bits: int, kind: int, rows: np.ndarray, transparent: bytes = b"") -> bytes:
    """A PNG file from the bytes of its rows, of any depth and kind of colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, bits, kind, 0, 0, 0))
    key = chunk(b"tRNS", transparent) if transparent else b""
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, bits: int, white_is_zero: bool = False, sample_format: int = 1) -> bytes:
    """An uncompressed little-endian grey TIFF file; 12 bits are packed as three bytes for two values."""
    if bits == 12:
        first, second = values[:, ::2].astype(int), values[:, 1::2].astype(int)
        packed = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
        body = np.stack(packed, axis=2).astype(np.uint8).tobytes()
    else:
        body = values.astype(f"<u{bits // 8}").tobytes()
    entries = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: SIDE}
    entries |= {279: len(body), 339: sample_format}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + struct.pack("<H", len(entries)) + table + bytes(4)


def laid_over(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None].astype(int)
    return ((pixels.astype(int) * a + np.array(GROUND) * (255 - a) + 127) // 255).astype(np.uint8)


def holed(pixels: np.ndarray, holes: np.ndarray = HOLES) -> np.ndarray:
    return np.where(holes[..., None], np.array(GROUND, np.uint8), pixels)


def swapped_profile(padding: int = 0) -> bytes:
    """A profile: sRGB with red and green exchanged, followed by so many bytes of no meaning."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    places = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * profile[131], 12)}
    for red, green in ((b"rXYZ", b"gXYZ"), (b"rTRC", b"gTRC")):
        profile[places[red] : places[red] + 4], profile[places[green] : places[green] + 4] = green, red
    profile += random.Random(0).randbytes(padding)
    profile[:4] = struct.pack(">I", len(profile))
    return bytes(profile)


def turned() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        for form, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("TIFF", "tif"), ("AVIF", "avif")):
            payload = saved(RGB, form, exif=exif)
            with Image.open(io.BytesIO(payload)) as image:
                pixels = np.asarray(ImageOps.exif_transpose(image))
            remark = colours.TURNED if turn > 1 and form != "TIFF" else ""
            found[f"turn{turn}.{suffix}"] = Case(payload, pixels, remark=remark)
    return found


def turned_late() -> dict[str, Case]:
    """PNG files whose EXIF data, or what stands for them, come after the pixels."""
    exif, xmp = Image.Exif(), b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>3</tiff:Orientation></x:xmpmeta>'
    exif[0x0112] = 3
    plain, end = saved(RGB), struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    chunks = {"exif": (b"eXIf", exif.tobytes()[6:]), "xmp": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)}
    found: dict[str, Case] = {}
    for name, (kind, content) in chunks.items():
        chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        found[f"turn-late-{name}.png"] = Case(plain.replace(end, chunk + end), RGB[::-1, ::-1], remark=colours.TURNED)
    return found


def deep() -> dict[str, Case]:
    top, twelve = rgb((DEEP.astype(int) * 255 / 65535 + 0.5).astype(np.uint8)), DEEP >> 4
    of_twelve = rgb((twelve.astype(int) * 255 / 4095 + 0.5).astype(np.uint8))
    big = DEEP.astype(">u2")
    files = {
        "16.png": (saved(DEEP), top),
        "16.tif": (tiff(DEEP, 16), top),
        "16-inverted.tif": (tiff(65535 - DEEP, 16, white_is_zero=True), top),
        "12.tif": (tiff(twelve, 12), of_twelve),
        "16.pgm": (b"P5 16 16 65535\n" + big.tobytes(), top),
        "12.pgm": (b"P5 16 16 4095\n" + twelve.astype(">u2").tobytes(), of_twelve),
        "16.jp2": (saved(DEEP, "JPEG2000"), top),
        "16-big-endian.tif": (saved(Image.frombytes("I;16B", (SIDE, SIDE), big.tobytes()), "TIFF"), top),
    }
    return {name: Case(payload, pixels, 1, colours.DEEP) for name, (payload, pixels) in files.items()}


def transparent() -> dict[str, Case]:
    alpha = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    some = alpha > 100
    few = np.where(HOLES, 5, GREY % 4).astype(np.uint8)
    palette = Image.fromarray(few % 6)
    palette.putpalette([value for index in range(6) for value in (40 * index, 255 - 40 * index, 7)])
    listed = np.stack([40 * (few % 6), 255 - 40 * (few % 6), np.full_like(few, 7)], axis=2)
    bits = np.packbits(HOLES, axis=1)
    four = (few[:, ::2] << 4) | few[:, 1::2]
    key = RGB.copy()
    key[HOLES] = (1, 2, 3)
    deep_key = np.where(HOLES, 700, DEEP | 1024).astype(">u2")
    wide = np.where(HOLES[..., None], 0x0102, RGB.astype(int) << 8 | 1).astype(">u2")
    files = {
        "rgba.png": (saved(np.dstack([RGB, alpha])), laid_over(RGB, alpha)),
        "rgba.webp": (saved(np.dstack([RGB, 255 * some.astype(np.uint8)]), "WEBP", lossless=True), holed(RGB, ~some)),
        "rgba.tif": (saved(np.dstack([RGB, alpha]), "TIFF"), laid_over(RGB, alpha)),
        "la.png": (saved(np.dstack([GREY, alpha])), laid_over(rgb(GREY), alpha)),
        "p-list.png": (saved(palette, transparency=bytes([255, 255, 255, 255, 255, 0])), holed(listed, few == 5)),
        "p-one.gif": (saved(palette, "GIF", transparency=5), holed(listed, few == 5)),
        "key.png": (saved(key, transparency=(1, 2, 3)), holed(key)),
        "key16.png": (
            png(16, 2, wide, struct.pack(">HHH", 0x0102, 0x0102, 0x0102)),
            holed((wide >> 8).astype(np.uint8)),
        ),
        "grey-key.png": (saved(few, transparency=5), holed(rgb(few), few == 5)),
        "grey4-key.png": (png(4, 0, four, b"\0\5"), holed(rgb(few * 17), few == 5)),
        "deep-key.png": (
            png(16, 0, deep_key, struct.pack(">H", 700)),
            holed(rgb((deep_key / 257 + 0.5).astype(np.uint8))),
        ),
        "bit-key.png": (png(1, 0, bits, b"\0\1"), holed(rgb(np.zeros_like(GREY)))),
    }
    return {name: Case(payload, pixels, 1, colours.TRANSPARENT) for name, (payload, pixels) in files.items()}


def profiled() -> dict[str, Case]:
    exchanged = RGB[..., [1, 0, 2]]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = random.Random(1).randbytes(1_500_000)
    rgba = np.dstack([RGB, np.where(HOLES, 0, 255).astype(np.uint8)])
    as_jpeg = np.asarray(Image.open(io.BytesIO(saved(RGB, "JPEG"))))
    parts = saved(RGB, "JPEG", icc_profile=swapped_profile())
    return {
        "srgb.png": Case(saved(RGB, icc_profile=srgb), RGB),
        "swapped.png": Case(saved(RGB, icc_profile=swapped_profile()), exchanged, 2, colours.CONVERTED),
        "swapped.webp": Case(
            saved(RGB, "WEBP", lossless=True, icc_profile=swapped_profile()), exchanged, 2, colours.CONVERTED
        ),
        "swapped.tif": Case(saved(RGB, "TIFF", icc_profile=swapped_profile()), exchanged, 2, colours.CONVERTED),
        "large.png": Case(saved(RGB, icc_profile=swapped_profile(2_000_000)), exchanged, 2, colours.CONVERTED),
        "holes.png": Case(saved(rgba, icc_profile=swapped_profile()), holed(exchanged), 2, colours.CONVERTED),
        "damaged.png": Case(saved(RGB, icc_profile=noise), RGB, remark=colours.MISFIT),
        "cut.jpg": Case(parts.replace(b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0\1\2"), as_jpeg, remark=colours.MISFIT),
        "of-colour.png": Case(saved(GREY, icc_profile=swapped_profile()), rgb(GREY), remark=colours.MISFIT),
    }


def others() -> dict[str, Case]:
    flat = Image.new("RGB", (SIDE, SIDE), (200, 40, 40))
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "lime", "blue")]
    red, rest = np.asarray(frames[0]), {"save_all": True, "append_images": frames[1:], "duration": 100}
    return {
        "cmyk.jpg": Case(saved(flat.convert("CMYK"), "JPEG", quality=100), np.asarray(flat), 2),
        "first.gif": Case(saved(frames[0], "GIF", **rest), red, remark=colours.FRAMES),
        "first.webp": Case(saved(frames[0], "WEBP", lossless=True, **rest), red, remark=colours.FRAMES),
        "first.png": Case(saved(frames[0], "PNG", **rest), red, remark=colours.FRAMES),
        "first.tif": Case(
            saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]), red, remark=colours.FRAMES
        ),
        "preview.jpg": Case(saved(flat, "MPO", save_all=True, append_images=frames), np.asarray(flat), 2),
        "bits.png": Case(saved(Image.fromarray(HOLES)), rgb(255 * HOLES.astype(np.uint8))),
        "bits.pbm": Case(saved(Image.fromarray(HOLES), "PPM"), rgb(255 * HOLES.astype(np.uint8))),
        "wide.png": Case(png(16, 2, (RGB.astype(int) * 257).astype(">u2")), RGB),
        "plain.avif": Case(saved(flat, "AVIF", quality=100), np.asarray(flat), 3),
        "plain.bmp": Case(saved(RGB, "BMP"), RGB),
        "plain.tga": Case(saved(RGB, "TGA"), RGB),
        "plain.jp2": Case(saved(RGB, "JPEG2000"), RGB),
    }


TABLE = turned() | turned_late() | deep() | transparent() | profiled() | others()


@pytest.mark.parametrize("name", TABLE)
def test_a_file_is_read_as_it_means(name: str) -> None:
    case = TABLE[name]
    for channels in (3, 1):
        form = Form(resolution=SIDE, channels=channels, encoding="raw", background=FORM.background)
        found, remarks = square(case.payload, form, name)
        wanted = case.pixels if channels == 3 else np.asarray(Image.fromarray(case.pixels).convert("L"))
        assert np.abs(found.astype(int) - wanted).max() <= case.near + (channels == 1 and case.near > 0)
        assert {case.remark} - {""} <= remarks
        assert colours.TURNED not in remarks or "turn" in name


def in_folder(place: Path) -> str:
    for name, case in TABLE.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(case.payload)
    return str(place)


def in_zip(place: Path) -> str:
    with zipfile.ZipFile(place.with_suffix(".zip"), "w") as archive:
        for name, case in TABLE.items():
            archive.writestr(name, case.payload)
    return str(place.with_suffix(".zip"))


STOCK = {"png", "jpg", "webp", "pgm"}
"""Kinds of member that tars of other formats do not hold."""


def in_tar(place: Path, names: list[str] | None = None) -> str:
    place.mkdir()
    with tarfile.open(place / "a.tar", "w") as archive:
        for name in names or TABLE:
            member = tarfile.TarInfo(f"{name.rpartition('.')[0]}-{name.replace('.', '-')}.{name.rpartition('.')[2]}")
            member.size = len(TABLE[name].payload)
            archive.addfile(member, io.BytesIO(TABLE[name].payload))
    return str(place)


CONTAINERS: dict[str, Callable[[Path], str]] = {"folder": in_folder, "zip": in_zip, "tar": in_tar}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path, container: str) -> None:
    rewrite = container == "tar"
    choices = Choices(
        resolution=SIDE,
        background=FORM.background,
        rewrite=rewrite,
        held_out=0,
        samples_per_shard=9,
    )
    told: list[str] = []
    source = CONTAINERS[container](tmp_path / "in")
    manifest = prepare("mine", source, str(tmp_path / "set"), choices=choices, tell=told.append)
    images = cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache").images.transpose(0, 2, 3, 1)
    for name, image in zip(TABLE if rewrite else sorted(TABLE), images, strict=True):
        assert np.abs(image.astype(int) - TABLE[name].pixels).max() <= TABLE[name].near, name
    for remark in (colours.TURNED, colours.DEEP, colours.TRANSPARENT, colours.CONVERTED, colours.MISFIT):
        count = sum(remark in square(TABLE[name].payload, FORM, "")[1] for name in TABLE)
        assert any(f"note: {count} images {remark}, for example" in line for line in told), remark


def test_tars_that_stay_are_looked_at_too(tmp_path: Path) -> None:
    for name in TABLE:
        if name.rpartition(".")[2] not in STOCK:
            continue
        needed = TABLE[name].remark not in ("", colours.MISFIT) or name in ("large.png", "damaged.png")
        needed = needed or "bits" in name or "cmyk" in name
        place = in_tar(tmp_path / name, [name])
        if needed:
            with pytest.raises(DataError, match=r"add --rewrite"):
                prepare("mine", place, place)
        else:
            assert prepare("mine", place, place).resolution == SIDE


@pytest.mark.parametrize(
    "payload",
    [tiff(DEEP.astype(np.uint32), 32), tiff(DEEP, 16, sample_format=2), saved(Image.fromarray(DEEP / 65535), "TIFF")],
)
def test_values_without_a_stated_white_are_not_guessed(payload: bytes) -> None:
    with pytest.raises(DataError, match=r"a: no readable image .*state no white: save it with 8 or 16 bits"):
        square(payload, FORM, "a")


@pytest.mark.filterwarnings("ignore")
def test_damage_anywhere_is_one_message_or_an_image() -> None:
    chance = random.Random(3)
    for name, case in TABLE.items():
        for _ in range(12):
            spoilt = bytearray(case.payload[: chance.choice([len(case.payload), chance.randrange(len(case.payload))])])
            for _ in range(chance.randrange(1, 6)):
                if spoilt:
                    spoilt[chance.randrange(min(len(spoilt), 2000))] = chance.randrange(256)
            try:
                found, _ = square(bytes(spoilt), Form(resolution=1, channels=3, encoding="raw"), name)
                assert found.shape == (1, 1, 3)
            except DataError as error:
                assert str(error).startswith(name)
