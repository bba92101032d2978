"""A file at any URL, to be read here and there."""

import io
from pathlib import Path
from typing import BinaryIO, cast

from data import store
from data.store.failures import failure

_BLOCK = 2**20


class _Ranges(io.RawIOBase):
    """The file at a URL, each read a range of it."""

    def __init__(self, url: str) -> None:
        """Asks for the length and the version."""
        self._url = url
        self._version = store.version(url)
        self._at = 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read anywhere."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the place of the next read."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._version.length}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fills the buffer, as far as the file and one range reach."""
        end = min(self._at + min(len(buffer), store.RANGE_BYTES), self._version.length)
        block = store.read_range(self._url, self._at, end, self._version) if end > self._at else b""
        buffer[: len(block)] = block
        self._at += len(block)
        return len(block)


def open_seekable(url: str) -> BinaryIO:
    """The file at `url`, opened for reading here and there."""
    if not store.is_local(url):
        return cast(BinaryIO, io.BufferedReader(_Ranges(url), _BLOCK))
    try:
        return Path(store.absolute(url)).open("rb")
    except OSError as error:
        raise failure("read", url, error) from error
