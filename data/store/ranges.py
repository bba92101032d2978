"""One try at a range of a file: it comes whole and from the version that is meant, or not at all."""

import asyncio
from dataclasses import dataclass
from typing import Any

from data.errors import DataError
from data.store.failures import ShortAnswerError, status
from data.store.filesystems import is_s3, reader

_MARKS = ("ETag", "etag", "generation", "LastModified", "Last-Modified", "mtime", "ino")


class WrongBytesError(DataError):
    """What came is not one whole version of the file with the bytes it should have; another try may bring it."""

    def __init__(self, message: str, reason: str) -> None:
        """`reason` is what `data.store.retries` counts."""
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Version:
    """What a URL means at one moment.

    Attributes:
        length: Bytes of the file.
        mark: Differs when the file was replaced: the ETag on S3; "" if the storage tells nothing of that kind.
    """

    length: int
    mark: str


def version_of(url: str) -> Version:
    """What is at `url` now."""
    found, path = reader(url)
    info = found.info(path)
    if info["type"] == "directory":
        raise IsADirectoryError(f"{path} is a folder")
    if info["size"] is None:
        raise DataError(
            f"the server of {url} does not state its length: download it by other means and give the local path"
        )
    marks = [str(info[name]) for name in _MARKS if info.get(name)]
    return Version(length=info["size"], mark=marks[0] if is_s3(url) and marks else " ".join(marks))


def replaced(url: str) -> WrongBytesError:
    """The error that says so."""
    message = f"{url} was replaced while it was read: read it again when nobody writes to it any more"
    return WrongBytesError(message, "file replaced while it was read")


def read_range(url: str, start: int, end: int, version: Version, seconds: float) -> bytes:
    """Bytes `start` to `end` (not included) of this version of the file; on S3 it takes at most so many seconds.

    On S3 the ETag of each answer is compared, because not every server heeds If-Match. Elsewhere whoever puts ranges
    together must ask for the version again at the end.
    """
    found, path = reader(url)
    if not is_s3(url):
        block: Any = found.cat_file(path, start=start, end=end)
    else:
        answer = asyncio.wait_for(_s3_range(found, path, start, end), seconds)
        try:
            block, mark = asyncio.run_coroutine_threadsafe(answer, found.loop).result()
        except OSError as error:
            if status(error) == 416:  # it became so short that it has no such bytes
                raise replaced(url) from error
            raise
        if mark and version.mark and mark != version.mark:
            raise replaced(url)
    if len(block) != end - start:
        raise ShortAnswerError(f"{end - start} bytes were asked for, but {len(block)} came")
    return block


async def _s3_range(found: Any, path: str, start: int, end: int) -> tuple[bytes, str]:
    """The bytes and the ETag of one answer, which s3fs's own `cat_file` does not tell."""
    bucket, key, _ = found.split_path(path)
    answer = await found._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
    async with answer["Body"] as body:
        return await body.read(), answer.get("ETag", "")
