"""What the stored values of an image mean: deep grey, transparency, colour profiles, and which way is up."""

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageColor, PngImagePlugin, TiffImagePlugin

TRANSPARENT = "have transparent parts, which are laid over the background"
DEEP = "are of more than 8 bits, which are scaled to 8"
TURNED = "are turned as their EXIF data say"
CONVERTED = "are converted from their colour profile to sRGB"
MISFIT = "have a colour profile that is damaged or of another kind of image, and are taken for sRGB"
FRAMES = "have several frames, of which the first is taken"
ENLARGED = "are enlarged"
"""Remarks: what was done with an image that its owner should know."""

LARGEST_PROFILE = 64 * 2**20
_SMALL_PROFILE = 2**20
"""Stock Pillow reads PNG files with profiles up to this length only."""
PngImagePlugin.MAX_TEXT_CHUNK = max(LARGEST_PROFILE, PngImagePlugin.MAX_TEXT_CHUNK)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_IN_PNG = (b"eXIf", b"iTXtXML:com.adobe.xmp", b"tEXtRaw profile type", b"zTXtRaw profile type")
_LONGEST_MARK = 32
_KEY_SCALES = {"L;2": 85, "L;4": 17}
_CLOSE = 2
"""A profile by which no colour changes by more than this is sRGB, written down by some other program."""


def _has_exif(png: bytes) -> bool:
    """Whether a PNG file has EXIF data, or a text that may stand for them, before or behind its pixels."""
    at = 8
    while at + 12 <= len(png):
        begin = png[at + 4 : at + 8 + _LONGEST_MARK]
        if begin.startswith(_EXIF_IN_PNG):
            return True
        at += 12 + int.from_bytes(png[at : at + 4])
    return False


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """How a stored image must be turned to be upright; None if it is, or if its EXIF data cannot be read."""
    unread = image.fp if isinstance(image, PngImagePlugin.PngImageFile) else None
    if isinstance(unread, io.BytesIO) and not _has_exif(unread.getvalue()):
        return None  # to look for it behind the pixels, Pillow would decode them
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's reader of damaged EXIF data raises anything
        return None


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """The transform from a profile to sRGB, None where there is nothing to do, and the remark to make."""
    try:
        stored = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(stored, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None, MISFIT
    if mode == "CMYK":
        return transform, CONVERTED
    steps = np.arange(0, 256, 15 if mode == "RGB" else 1, dtype=np.uint8)
    colours = np.stack(np.meshgrid(*[steps] * len(mode), indexing="ij"), axis=-1).reshape(1, -1, len(mode))
    made = np.asarray(transform.apply(Image.fromarray(colours if mode == "RGB" else colours[..., 0])), np.int16)
    return (None, "") if np.abs(made - colours).max() <= _CLOSE else (transform, CONVERTED)


def _profile(image: Image.Image) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    if "icc_profile" not in image.info:
        return None, ""
    # Pillow gives None for one that was compressed and is damaged, or lies in parts of which some are missing.
    profile = image.info["icc_profile"] or b""
    if image.mode == "CMYK":
        return _to_srgb(profile, "CMYK")
    grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
    return _to_srgb(profile, "L" if grey else "RGB")


def _depth(image: Image.Image) -> tuple[int, bool] | None:
    """Of a grey image of more than 8 bits the value that is white, or black if true; None for any other.

    One that states no such value is a ValueError.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("signed and 32-bit values state no white: save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return None
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    bits = max(np.atleast_1d(tags.get(TiffImagePlugin.BITSPERSAMPLE, 16)).tolist())
    return 2**bits - 1, tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _key(image: Image.Image) -> int | tuple[int, ...] | bytes | None:
    """The colour that a file calls transparent, as its pixels are decoded; not yet loaded, it still says its depth."""
    key = image.info.get("transparency")
    layout = image.tile[0].args if isinstance(image, PngImagePlugin.PngImageFile) and image.tile else ""
    if isinstance(key, int) and image.mode == "L":
        return key * _KEY_SCALES.get(str(layout), 1)
    if isinstance(key, tuple) and layout == "RGB;16B":
        return tuple(value >> 8 for value in key)
    return key


def needs(image: Image.Image) -> tuple[str, ...]:
    """What an opened image needs before it can be trained on, besides its size: remarks as above."""
    profile, _ = _profile(image)
    large = image.format == "PNG" and len(image.info.get("icc_profile") or b"") > _SMALL_PROFILE
    found = {
        TRANSPARENT: image.has_transparency_data,
        DEEP: image.mode.startswith("I"),
        TURNED: turn_of(image) is not None,
        CONVERTED: profile is not None,
        "have a colour profile so large that other readers refuse them": large,
        FRAMES: _frames(image),
    }
    return tuple(text for text, true in found.items() if true)


def _frames(image: Image.Image) -> bool:
    """Whether it is an animation or has several pages; the second picture of a photograph (MPO) is its preview."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception as error:  # Pillow's readers of damaged files raise anything
        raise ValueError(f"damaged behind its first frame: {error}") from error


def reader(
    image: Image.Image, mode: str, background: str, remarks: set[str], *, profiles: bool = True
) -> Callable[[Image.Image], Image.Image]:
    """Loads an opened image; what it gives makes any piece of it grey ("L") or sRGB ("RGB"), 8 bits, without alpha.

    Args:
        image: As opened, before any pixel is decoded.
        mode: "L" or "RGB".
        background: The colour that transparent parts are laid over, in a form Pillow knows.
        remarks: Takes what is done that the owner should know.
        profiles: Whether a colour profile is heeded.
    """
    if _frames(image):
        remarks.add(FRAMES)
    depth, key = _depth(image), _key(image)
    image.load()
    transform, remark = _profile(image) if profiles else (None, "")
    remarks.update({remark} - {""}, {DEEP} if depth else ())
    if key is not None:
        image.info["transparency"] = key
    ground = ImageColor.getrgb(background)[:3]

    def plain(piece: Image.Image) -> Image.Image:
        colours, alpha = _deep(piece, *depth) if depth else _parted(piece)
        if transform is not None:
            colours = transform.apply(colours)
        if alpha is not None and alpha.getextrema() != (255, 255):
            remarks.add(TRANSPARENT)
            colours = Image.composite(colours.convert("RGB"), Image.new("RGB", piece.size, ground), alpha)
        return colours if colours.mode == mode else colours.convert(mode)

    return plain


def _deep(piece: Image.Image, white: int, inverted: bool) -> tuple[Image.Image, Image.Image | None]:
    """Deep grey as 8 bits, and what covers it."""
    values = np.asarray(piece).astype(np.int64)
    scaled = np.clip((values * 510 + white) // (2 * white), 0, 255).astype(np.uint8)
    key = piece.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.fromarray(255 - scaled if inverted else scaled), alpha


def _parted(piece: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours of a piece, as L, RGB or CMYK, and what covers them."""
    if piece.has_transparency_data:
        covered = piece.convert("RGBA")
        alpha = covered.getchannel("A")
        colours = piece.getchannel(0) if piece.mode in ("L", "LA") else covered.convert("RGB")
        return colours, alpha
    if piece.mode in ("L", "RGB", "CMYK"):
        return piece, None
    return piece.convert("L" if piece.mode == "1" else "RGB"), None
