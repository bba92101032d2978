"""Reads, writes and lists at any URL (see `data.store.filesystems` for what that may be).

Every failure leaves as a DataError that names the URL and a remedy. What a further try can mend is tried again, up to a
deadline, and counted (`data.store.retries`).
"""

import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from data.errors import DataError
from data.store import ranges
from data.store.failures import explained, failure
from data.store.filesystems import absolute, arrow_filesystem, filesystem, has_buckets, is_local, is_s3, join, reader
from data.store.ranges import Version, WrongBytesError
from data.store.retries import note, retried

__all__ = [
    "RANGE_BYTES",
    "Version",
    "absolute",
    "arrow_filesystem",
    "check_writable",
    "download_tree",
    "exists",
    "fetch",
    "file_sizes",
    "is_local",
    "join",
    "list_names",
    "read_bytes",
    "read_json",
    "read_range",
    "remove",
    "version",
    "walk",
    "write_bytes",
    "write_json",
]

T = TypeVar("T")

RANGE_BYTES = 8 * 2**20
"""Longest range asked for at once: s3fs fetches longer ones in parts, and a short part would leave zeros behind."""

_CHECK_SECONDS = 20.0
_SHORT_DEADLINE = 20.0
_FETCH_DEADLINE = 120.0
_SLOWEST_BYTES_PER_SECOND = 500_000
_PASSES = 3
"""How often a file is read from its beginning, if it is replaced meanwhile or has other bytes than it should."""


def _tried(action: str, url: str, call: Callable[[], T], seconds: float | None = None) -> T:
    """The result of `call`, tried again for so many seconds; on this machine's own disks it is tried once."""
    patience = _SHORT_DEADLINE if seconds is None else seconds
    return retried(action, url, call, 0.0 if is_local(url) else time.monotonic() + patience)


def _passes(call: Callable[[], T]) -> T:
    """The result of `call`, which reads a file from its beginning, until the bytes are right."""
    for left in reversed(range(_PASSES)):
        try:
            return call()
        except WrongBytesError as error:
            if not left:
                raise
            note(error.reason)
    raise AssertionError("the loop above returns or raises")


@contextmanager
def _replacing(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
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


def exists(url: str) -> bool:
    """Whether there is a file or folder at `url`."""

    def asked() -> bool:
        found, path = reader(url)
        try:
            found.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    return _tried("read", url, asked)


def version(url: str) -> Version:
    """Which file is at `url` now: its length, and a mark that changes when it is replaced."""
    return _tried("read", url, partial(ranges.version_of, url))


def read_range(url: str, start: int, end: int, known: Version) -> bytes:
    """Bytes `start` to `end` (not included) of a file; ask for at most 8 MiB.

    On S3, a DataError if the file is no longer the version that is known.
    """
    return _range(url, start, end, known, time.monotonic() + _SHORT_DEADLINE)


def _range(url: str, start: int, end: int, known: Version, until: float) -> bytes:
    def call() -> bytes:
        return ranges.read_range(url, start, end, known, max(1.0, until - time.monotonic()))

    return _tried(f"read bytes {start} to {end} of", url, call, until - time.monotonic())


def _blocks(url: str, known: Version, until: float) -> Iterator[bytes]:
    """The file at `url` in ranges of at most 8 MiB that are all of one version."""
    for start in range(0, known.length, RANGE_BYTES):
        yield _range(url, start, min(start + RANGE_BYTES, known.length), known, until)
    if not is_s3(url) and _tried("read", url, partial(ranges.version_of, url)) != known:
        raise ranges.replaced(url)


def _deadline(length: int) -> float:
    return time.monotonic() + _FETCH_DEADLINE + length / _SLOWEST_BYTES_PER_SECOND


def read_bytes(url: str) -> bytes:
    """The whole (small) file at `url`; use `fetch` for large ones."""

    def whole() -> bytes:
        known = version(url)
        return b"".join(_blocks(url, known, _deadline(known.length)))

    return _passes(whole)


def read_json(url: str) -> Any:
    """The JSON value at `url`."""
    payload = read_bytes(url)
    try:
        return json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{url} is not valid JSON ({error}): it is damaged or not the file meant; write it again"
        ) from error


def write_bytes(url: str, payload: bytes) -> None:
    """Writes a file; parents are made as needed, and readers see the old file or the whole new one."""
    _tried("write", url, partial(_put, url, payload))


def _put(url: str, payload: bytes) -> None:
    found, path = filesystem(url)
    if is_local(url):
        with _replacing(Path(path)) as file:
            file.write(payload)
        return
    # Object stores have no folders, and there makedirs would try to create the bucket.
    if not has_buckets(url):
        found.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
    found.pipe_file(path, payload)


def write_json(url: str, value: Any) -> None:
    """Writes a JSON value, indented, with sorted keys."""
    write_bytes(url, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def remove(url: str) -> None:
    """Removes the file at `url`; it is no error if there is none."""

    def call() -> None:
        found, path = reader(url)
        with suppress(FileNotFoundError):
            found.rm_file(path)

    _tried("remove", url, call)


def _entries(url: str) -> list[dict[str, Any]]:
    def call() -> list[dict[str, Any]]:
        found, path = reader(url)
        try:
            entries = found.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [entry for entry in entries if entry["name"].strip("/") != path.strip("/")]

    return _tried("list", url, call)


def list_names(url: str) -> list[str]:
    """Sorted names directly under `url`, [] if it is absent. Hidden names (unfinished writes) are left out."""
    names = {PurePosixPath(entry["name"]).name for entry in _entries(url)}
    return sorted(name for name in names if not name.startswith("."))


def file_sizes(url: str) -> dict[str, int]:
    """Bytes of each file directly under `url`, by name; empty if it is absent. It costs one listing."""
    return {PurePosixPath(entry["name"]).name: entry["size"] for entry in _entries(url) if entry["type"] == "file"}


def walk(url: str) -> dict[str, int]:
    """Bytes of each file anywhere under `url`, by its path from there, sorted; {"": size} if `url` is a file itself."""

    def call() -> dict[str, int]:
        found, root = reader(url)
        files = dict(found.find(root, detail=True))
        root = root.rstrip("/")
        return {path.removeprefix(root).lstrip("/"): info["size"] for path, info in sorted(files.items())}

    return _tried("list", url, call)


def check_writable(url: str) -> None:
    """Writes a small file under `url`, reads it and removes it; a DataError within about 20 seconds if that fails."""
    found, root = filesystem(url)
    name = f".bcm-write-check-{uuid.uuid4().hex}"
    marker, path = join(url, name), join(root, name)
    outcome: list[BaseException | None] = []

    def attempt() -> None:
        try:
            _put(marker, b"written to see whether this place can be written\n")
            found.cat_file(path)
            found.rm_file(path)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    # A server that never answers would hold this thread for longer than a user waits, so it is left behind.
    thread = threading.Thread(target=attempt, name="storage-write-check", daemon=True)
    thread.start()
    thread.join(_CHECK_SECONDS)
    if not outcome:
        raise failure("write to", url, TimeoutError(f"no answer within {_CHECK_SECONDS:.0f} seconds"))
    if (error := outcome[0]) is not None:
        raise failure("write to", url, error) from error


def download_tree(url: str, local_dir: Path | str) -> None:
    """Copies every file under `url` to the same place under `local_dir`; a URL without files is a DataError."""
    files = walk(url)
    if not files:
        raise DataError(f"there are no files at {url}: check the spelling")
    for name, size in files.items():
        if ".." in PurePosixPath(name).parts:
            raise DataError(
                f"{url} holds a file named {name!r}, which would leave the folder it is copied to: remove it"
            )
        fetch(join(url, name), size, None, Path(local_dir) / name)


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
    until = _deadline(expected_bytes or 0)
    _passes(partial(_fetch_once, url, expected_bytes, sha256, to, durable, until))


def _fetch_once(
    url: str, expected_bytes: int | None, sha256: str | None, to: Path, durable: bool, until: float
) -> None:
    meant = "read" if expected_bytes is None else f"read the {expected_bytes} bytes of"
    known = _tried(meant, url, partial(ranges.version_of, url), until - time.monotonic())
    if expected_bytes is not None and known.length != expected_bytes:
        change = "cut short" if known.length < expected_bytes else "longer than it was"
        raise DataError(
            f"{url} has {known.length} bytes, but {expected_bytes} are expected: it is {change} or was replaced. "
            "Copy it again from a good source, or write the whole set again."
        )
    if expected_bytes is None:
        until += known.length / _SLOWEST_BYTES_PER_SECOND
    digest = hashlib.sha256()
    with explained(f"copy to {to} from", url), _replacing(to, durable) as file:
        for block in _blocks(url, known, until):
            digest.update(block)
            file.write(block)
        if sha256 not in (None, digest.hexdigest()):
            raise WrongBytesError(
                f"{url} is damaged: its {known.length} bytes have SHA-256 {digest.hexdigest()}, but {sha256} is "
                "expected. Copy it again from a good source, or write the whole set again.",
                "other bytes than the SHA-256 states",
            )
