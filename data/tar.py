"""A fast reader of plain tar files: headers are found one by one, and checked all at once."""

import numpy as np
from numpy.typing import NDArray

BLOCK = 512
"""Headers and contents begin at multiples of this many bytes."""

_SIZE, _CHECKSUM, _KIND = slice(124, 135), slice(148, 154), 156
_ENDS = [135, 154, 155]
"""Places that end the digits; with anything else there, other readers may see other numbers."""


def plain_members(raw: NDArray[np.uint8]) -> list[tuple[str, int, int]] | None:
    """Name, first byte and length of each file in the tar with these bytes; None unless it is a plain and whole one.

    Plain are files and folders with short names and sizes in octal digits, each header with the right checksum, and a
    zero block at the end. The standard library knows the rest: links, extensions, other spellings.
    """
    headers = _headers(raw)
    if headers is None:
        return None
    blocks = raw[: len(raw) // BLOCK * BLOCK].reshape(-1, BLOCK)[headers // BLOCK]
    names, kinds, sizes = _names(blocks), blocks[:, _KIND], _octal(blocks[:, _SIZE])
    stated = _octal(blocks[:, _CHECKSUM])
    if names is None or sizes is None or stated is None:
        return None
    # Each header's bytes add up to the number it states, if its own digits count as spaces.
    sums = blocks.sum(1, dtype=np.int64) - blocks[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    folders = kinds == ord("5")
    if (sums != stated).any() or not np.isin(blocks[:, _ENDS], (0, ord(" "))).all():
        return None
    if not (folders | (kinds == 0) | (kinds == ord("0"))).all() or sizes[folders].any():
        return None
    if any(name.endswith("/") and not folder for name, folder in zip(names, folders.tolist(), strict=True)):
        return None
    members = zip(names, (headers + BLOCK).tolist(), sizes.tolist(), folders.tolist(), strict=True)
    return [(name, offset, size) for name, offset, size, folder in members if not folder]


def _headers(raw: NDArray[np.uint8]) -> NDArray[np.int64] | None:
    """First byte of each header, up to the zero block at the end; None if that is missing or a size is no number."""
    data, at = raw.data, 0
    headers: list[int] = []
    try:
        while data[at]:
            headers.append(at)
            size = bytes(data[at + _SIZE.start : at + _SIZE.stop])
            if not size.isdigit():
                return None
            at += BLOCK + -(-int(size, 8) // BLOCK) * BLOCK
    except (IndexError, ValueError):
        return None
    whole = at + BLOCK <= len(data) and not raw[at : at + BLOCK].any()
    return np.array(headers, np.int64) if whole else None


def _octal(digits: NDArray[np.uint8]) -> NDArray[np.int64] | None:
    """The numbers in rows of octal digits, None if there is anything else in them."""
    values = digits.astype(np.int64) - ord("0")
    if ((values < 0) | (values > 7)).any():
        return None
    return values @ 8 ** np.arange(values.shape[1] - 1, -1, -1)


def _names(blocks: NDArray[np.uint8]) -> list[str] | None:
    names, prefixes = (
        [
            row.partition(b"\0")[0]
            for row in np.ascontiguousarray(blocks[:, first:end]).view(f"S{end - first}")[:, 0].tolist()
        ]
        for first, end in ((0, 100), (345, 500))
    )
    # Only the POSIX form of header continues the name there, but not every reader heeds that.
    posix = (blocks[:, 257:263] == np.frombuffer(b"ustar\0", np.uint8)).all(1).tolist()
    if any(prefix and not is_posix for prefix, is_posix in zip(prefixes, posix, strict=True)):
        return None
    try:
        return [
            (prefix + b"/" + name if prefix else name).decode("utf-8")
            for name, prefix in zip(names, prefixes, strict=True)
        ]
    except UnicodeDecodeError:
        return None
