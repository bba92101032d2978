"""Whole files from a server that may fail: tried again within a deadline, of one version, with the right bytes.

Pauses between tries grow and vary at random, so that many workers do not come back at once; each further try is counted
by its cause.
"""

import asyncio
import hashlib
import io
import os
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from data.errors import DataError, StorageError
from data.store.failures import cause, failure, is_lasting, s3_code, status
from data.store.filesystems import S3, WEB, filesystem, is_local, scheme

T = TypeVar("T")

RANGE_BYTES = 8 * 2**20
"""Longest range asked for at once: s3fs fetches longer ones in parts, and a short part would leave zeros behind."""

_SHORT_DEADLINE = 20.0
_FETCH_DEADLINE = 120.0
_SLOWEST_BYTES_PER_SECOND = 500_000
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_PASSES = 3
"""How often a file is read from its beginning, if it is replaced meanwhile or has other bytes than it should."""
_REPLACED = "{url} was replaced while it was read: read it again when nobody writes to it any more"
_MARKS = ("ETag", "etag", "generation", "LastModified", "Last-Modified", "mtime", "ino")

_retries: Counter[str] = Counter()
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Version:
    """What a URL means at one moment.

    Attributes:
        length: Bytes of the file.
        mark: Differs when the file was replaced: the ETag on S3; "" if the storage tells nothing of that kind.
    """

    length: int
    mark: str


def retried(action: str, url: str, call: Callable[[], T], seconds: float = _SHORT_DEADLINE) -> T:
    """The result of `call`, which is tried again for so many seconds; on this machine's own disks it is tried once.

    What trying again cannot mend (no such file, no permission), and the last failure before the deadline, leave as a
    DataError "cannot {action} {url}: ...".
    """
    until = time.monotonic() + (0.0 if is_local(url) else seconds)
    for attempt in count(1):
        try:
            return call()
        except DataError:
            raise
        except Exception as error:
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            if is_lasting(error) or time.monotonic() + pause > until:
                raise failure(action, url, _explained(url, error), attempt) from error
            _note(cause(error))
            time.sleep(pause)
    raise AssertionError("the loop above returns or raises")


def _explained(url: str, error: Exception) -> Exception:
    """The error with S3's reason: a refusal to tell of a file is a bare status, that to list its bucket has words."""
    if scheme(url) in S3 and s3_code(error) in ("301", "400", "403"):
        try:
            files, path = filesystem(url, reading=True)
            files.ls(path.partition("/")[0])
        except Exception as refusal:  # as different as those of any call
            return refusal
    return error


def _note(reason: str) -> None:
    with _lock:
        _retries[reason] += 1


def retries() -> dict[str, int]:
    """How often this process has tried again since it began, by cause; the most frequent first."""
    with _lock:
        return dict(_retries.most_common())


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, or TimeoutError after so many seconds; the abandoned call ends with the process."""
    outcome: list[T] = []
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, name="within", daemon=True)
    thread.start()
    thread.join(seconds)
    for error in errors:
        raise error from error.__cause__ or error.__context__  # raising anew would replace the context
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    return outcome[0]


def version(url: str, action: str = "read", seconds: float = _SHORT_DEADLINE) -> Version:
    """Which file is at `url` now: its length, and a mark that changes when it is replaced; see `retried`."""
    files, path = filesystem(url, reading=True)
    info = retried(action, url, partial(files.info, path), seconds)
    if info["type"] == "directory":
        raise failure(action, url, IsADirectoryError(f"{path} is a folder"))
    if info["size"] is None:
        raise DataError(
            f"the server of {url} does not state its length: download it by other means and give the local path"
        )
    return Version(length=info["size"], mark=mark_of(info))


def mark_of(info: Mapping[str, Any], *, copied: bool = False) -> str:
    """What changes when the file that a storage described so is replaced: its ETag if there is one.

    Where a copy counts as the same file, its number on the disk does not matter.
    """
    marks = [str(info[name]) for name in _MARKS if info.get(name) and not (copied and name == "ino")]
    return marks[0] if "ETag" in info and marks else " ".join(marks)


def read_range(url: str, start: int, end: int, known: Version, seconds: float = _SHORT_DEADLINE) -> bytes:
    """Bytes `start` to `end` (not included) of a file; ask for at most 8 MiB.

    On S3, a DataError if the file is no longer the version that is known. Elsewhere whoever puts ranges together must
    ask for the version again at the end.
    """
    until = time.monotonic() + seconds
    return retried(f"read bytes {start} to {end} of", url, partial(_range, url, start, end, known, until), seconds)


def _range(url: str, start: int, end: int, known: Version, until: float) -> bytes:
    """One try; on S3 the ETag of the answer is compared, because not every server heeds If-Match."""
    files, path = filesystem(url, reading=True)
    if scheme(url) in WEB:
        block: Any = _http_range(files, path, start, end, known, url)
    elif scheme(url) not in S3:
        block = files.cat_file(path, start=start, end=end)
    else:
        answer = asyncio.wait_for(_s3_range(files, path, start, end), max(1.0, until - time.monotonic()))
        try:
            block, mark = asyncio.run_coroutine_threadsafe(answer, files.loop).result()
        except OSError as error:
            if status(error) == 416:  # it became so short that it has no such bytes
                raise DataError(_REPLACED.format(url=url)) from error
            raise
        if mark and known.mark and mark != known.mark:
            raise DataError(_REPLACED.format(url=url))
    if len(block) != end - start:
        raise EOFError(f"{end - start} bytes were asked for, but {len(block)} came")
    return block


def _http_range(files: Any, path: str, start: int, end: int, known: Version, url: str) -> bytes:
    """The bytes of one answer, of which no more are read if the server knows no ranges and sends the whole file."""
    with files.open(path, size=known.length, block_size=RANGE_BYTES, cache_type="none") as file:
        try:
            file.seek(start)
            return file.read(end - start)
        except ValueError as error:
            raise DataError(
                f"the server of {url} sends whole files only and no parts of them: download it first, with curl -O or "
                "wget, and give the local path"
            ) from error


async def _s3_range(files: Any, path: str, start: int, end: int) -> tuple[bytes, str]:
    """The bytes and the ETag of one answer, which s3fs's own `cat_file` does not tell."""
    bucket, key, _ = files.split_path(path)
    answer = await files._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
    async with answer["Body"] as body:
        return await body.read(), answer.get("ETag", "")


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` only when it is written whole and, if durable, flushed to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_bytes(url: str) -> bytes:
    """The whole (small) file at `url`; use `fetch` for large ones."""
    buffer = io.BytesIO()
    _fill(buffer, url, None, None)
    return buffer.getvalue()


def fetch(url: str, expected_bytes: int | None, sha256: str | None, to: Path, *, durable: bool = True) -> None:
    """Copies the file at `url` to the local path `to`, in ranges of at most 8 MiB, and checks its length and SHA-256.

    Ranges are tried again with growing, jittered pauses until a deadline that allows for 0.5 MB/s. A file that is
    replaced meanwhile, or comes with another hash, is read from its beginning, three times at most. `to` appears only
    when all is well.

    Args:
        url: The file.
        expected_bytes: Its length, or None to take the length the server states.
        sha256: Its hash in lower-case hex, or None for no check.
        to: The local path; an older file there is replaced.
        durable: Whether the copy must outlive a loss of power; passing copies are quicker without.
    """
    try:
        with replacing(to, durable) as file:
            _fill(file, url, expected_bytes, sha256)
    except OSError as error:
        raise failure(f"copy to {to} from", url, error) from error


def _fill(file: BinaryIO, url: str, expected_bytes: int | None, sha256: str | None) -> None:
    """Writes one whole version of the file at `url` into `file`, anew if it is replaced or has another hash."""
    until = time.monotonic() + _FETCH_DEADLINE + (expected_bytes or 0) / _SLOWEST_BYTES_PER_SECOND
    action = "read" if expected_bytes is None else f"read the {expected_bytes} bytes of"
    problem = ""
    for left in reversed(range(_PASSES)):
        known = version(url, action, until - time.monotonic())
        if expected_bytes is not None and known.length != expected_bytes:
            change = "cut short" if known.length < expected_bytes else "longer than it was"
            raise DataError(
                f"{url} has {known.length} bytes, but {expected_bytes} are expected: it is {change} or was replaced. "
                "Copy it again from a good source, or write the whole set again."
            )
        allowed = 0.0 if expected_bytes is not None else known.length / _SLOWEST_BYTES_PER_SECOND
        digest = _pass(file, url, known, until + allowed)
        if digest is not None and sha256 in (None, digest):
            return
        reason, problem = "file replaced while it was read", _REPLACED.format(url=url)
        if digest is not None:
            reason, problem = (
                "other bytes than the SHA-256 states",
                f"{url} is damaged: its {known.length} bytes have SHA-256 {digest}, but {sha256} is expected. "
                "Copy it again from a good source, or write the whole set again.",
            )
        if left:
            _note(reason)
    raise DataError(problem)


def _pass(file: BinaryIO, url: str, known: Version, until: float) -> str | None:
    """Writes the file at `url` into `file` from its beginning; its SHA-256, or None if it was replaced meanwhile."""
    digest = hashlib.sha256()
    file.seek(0)
    file.truncate()
    try:
        for start in range(0, known.length, RANGE_BYTES):
            end = min(start + RANGE_BYTES, known.length)
            block = read_range(url, start, end, known, until - time.monotonic())
            digest.update(block)
            file.write(block)
        replaced = scheme(url) not in S3 and version(url) != known
    except DataError as error:
        if isinstance(error, StorageError) or version(url) == known:
            raise
        replaced = True
    return None if replaced else digest.hexdigest()
