"""The only user of fsspec: reads, writes and lists at any URL.

A URL is a local path, `file://...`, `s3://bucket/path` or anything else that fsspec knows. Credentials and endpoints
come from the environment alone (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...). Every failure leaves as a DataError that
names the URL and a remedy. No file system object is kept between calls, so nothing is carried across a fork.
"""

import hashlib
import json
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import fsspec
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

from data.errors import DataError
from data.explain import explained, failure, is_lasting

T = TypeVar("T")

RANGE_BYTES = 8 * 2**20
"""Longest range asked for at once: s3fs fetches longer ones in parts, and a short part would leave zeros behind."""

_ATTEMPTS = 5
_CHECK_SECONDS = 20.0
_SLOWEST_BYTES_PER_SECOND = 500_000
_SHORT_DEADLINE = 15.0
_FETCH_DEADLINE = 120.0

# s3fs tries five times by itself, so botocore need not; listings are never cached because other processes write too.
# Servers other than Amazon's refuse the newer checksum trailers, or answer a range with the checksum of the whole file.
_S3_OPTIONS: Mapping[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 15,
        "retries": {"total_max_attempts": 1},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    },
}
_S3_PROTOCOLS = ("s3", "s3a")
_BUCKET_STORES = (*_S3_PROTOCOLS, "gs", "gcs", "az", "abfs", "abfss", "adl")


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower() if "://" in url else "file"


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system of a URL and the path inside it."""
    if not url.strip():
        raise DataError("the storage URL is empty: give a path or a URL such as s3://bucket/folder")
    scheme = _scheme(url)
    if "@" in urlsplit(url).netloc:
        raise DataError(
            f"the {scheme} URL holds credentials (a part before '@'): give them in the environment instead, for "
            "example as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if scheme in _BUCKET_STORES and not urlsplit(url).netloc:
        raise DataError(f"{url} names no bucket: write {scheme}://bucket/folder")
    if "::" in url:
        raise DataError(f"{url} chains several file systems, which is not supported: give one plain URL")
    options = _S3_OPTIONS if scheme in _S3_PROTOCOLS else {}
    with explained("open", url):
        return fsspec.core.url_to_fs(url, **options)


def is_local(url: str) -> bool:
    """Whether a URL is a path on this machine."""
    return _scheme(url) in ("file", "local")


def _local_path(url: str) -> Path:
    return Path(filesystem(url)[1])


def absolute(url: str) -> str:
    """A local path made absolute (without `file://`); any other URL as it is."""
    return str(_local_path(url)) if is_local(url) else url


def join(url: str, *parts: str) -> str:
    """`url` with path parts added."""
    if not url.strip():
        raise DataError("the storage URL is empty: give a path or a URL such as s3://bucket/folder")
    root = url if url.endswith("://") else url.rstrip("/") + "/"
    return root + "/".join(part.strip("/") for part in parts)


def arrow_filesystem(url: str) -> tuple[pyarrow.fs.FileSystem | None, str]:
    """What Ray's RunConfig wants: (None, absolute path) for a local path, else (file system, path inside it).

    The file system pickles without credentials: each process that unpickles it reads them from its own environment.
    """
    if is_local(url):
        return None, absolute(url)
    found, path = filesystem(url)
    if {"key", "secret", "token"} & set(found.storage_options):
        raise DataError(
            "fsspec's own settings (FSSPEC_S3_* or its configuration file) hold credentials, which would be written "
            "into Ray's files: give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment instead"
        )
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(found)), path


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` only when it is written whole and flushed to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _info(url: str) -> dict[str, Any] | None:
    found, path = filesystem(url)
    with explained("read", url):
        try:
            return found.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return None


def exists(url: str) -> bool:
    """Whether there is a file or folder at `url`."""
    return _info(url) is not None


def read_bytes(url: str) -> bytes:
    """The whole (small) file at `url`; use `fetch` for large ones."""
    found, path = filesystem(url)
    payload: Any = _retried("read", url, lambda: found.cat_file(path))
    return payload


def read_json(url: str) -> Any:
    """The JSON value at `url`."""
    payload = read_bytes(url)
    try:
        return json.loads(payload)
    except ValueError as error:
        raise DataError(
            f"{url} is not valid JSON ({error}): it is damaged or not the file meant; write it again"
        ) from error


def write_bytes(url: str, payload: bytes) -> None:
    """Writes a file; parents are made as needed, and readers see the old file or the whole new one."""
    _retried("write", url, partial(_put, url, payload))


def _put(url: str, payload: bytes) -> None:
    found, path = filesystem(url)
    if isinstance(found, LocalFileSystem):
        with _replacing(Path(path)) as file:
            file.write(payload)
    else:
        _make_parents(found, path, url)
        found.pipe_file(path, payload)


def _make_parents(found: fsspec.AbstractFileSystem, path: str, url: str) -> None:
    # Object stores have no folders, and there makedirs would try to create the bucket.
    if _scheme(url) not in _BUCKET_STORES:
        found.makedirs(str(PurePosixPath(path).parent), exist_ok=True)


def write_json(url: str, value: Any) -> None:
    """Writes a JSON value, indented, with sorted keys."""
    write_bytes(url, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def remove(url: str) -> None:
    """Removes the file at `url`; it is no error if there is none."""
    found, path = filesystem(url)
    with explained("remove", url), suppress(FileNotFoundError):
        found.rm_file(path)


def _entries(url: str) -> list[dict[str, Any]]:
    found, path = filesystem(url)
    with explained("list", url):
        try:
            entries = found.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [entry for entry in entries if entry["name"].strip("/") != path.strip("/")]


def list_names(url: str) -> list[str]:
    """Sorted names directly under `url`, [] if it is absent. Hidden names (unfinished writes) are left out."""
    names = {PurePosixPath(entry["name"]).name for entry in _entries(url)}
    return sorted(name for name in names if not name.startswith("."))


def file_sizes(url: str) -> dict[str, int]:
    """Bytes of each file directly under `url`, by name; empty if it is absent. It costs one listing."""
    return {PurePosixPath(entry["name"]).name: entry["size"] for entry in _entries(url) if entry["type"] == "file"}


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
    found, root = filesystem(url)
    with explained("list", url):
        files = dict(found.find(root, detail=True))
    if not files:
        raise DataError(f"there are no files at {url}: check the spelling")
    for path, info in sorted(files.items()):
        relative = PurePosixPath(path).relative_to(root)
        if ".." in relative.parts:
            raise DataError(
                f"{url} holds a file named {path!r}, which would leave the folder it is copied to: remove it"
            )
        fetch(join(url, str(relative)), info["size"], None, Path(local_dir) / relative)


def fetch(url: str, expected_bytes: int | None, sha256: str | None, to: Path) -> None:
    """Copies the file at `url` to the local path `to`, in ranges of at most 8 MiB, and checks its length and SHA-256.

    Ranges are retried with growing, jittered pauses until a deadline that allows for 0.5 MB/s. `to` appears only when
    all is well.

    Args:
        url: The file.
        expected_bytes: Its length, or None to take the length the server states.
        sha256: Its hash in lower-case hex, or None for no check.
        to: The local path; an older file there is replaced.
    """
    length = _retried("read", url, lambda: _stated_length(url))
    if expected_bytes is not None and length != expected_bytes:
        change = "cut short" if length < expected_bytes else "longer than it was"
        raise DataError(
            f"{url} has {length} bytes, but {expected_bytes} are expected: it is {change} or was replaced. "
            "Copy it again from a good source, or write the whole set again."
        )
    until = time.monotonic() + _FETCH_DEADLINE + length / _SLOWEST_BYTES_PER_SECOND
    digest = hashlib.sha256()
    with explained(f"copy to {to} from", url), _replacing(to) as file:
        for start in range(0, length, RANGE_BYTES):
            block = _retried(
                "read",
                url,
                partial(_read_range, url, start, min(start + RANGE_BYTES, length)),
                until - time.monotonic(),
            )
            digest.update(block)
            file.write(block)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise DataError(
                f"{url} is damaged: its {length} bytes have SHA-256 {digest.hexdigest()}, but {sha256} is expected. "
                "Copy it again from a good source, or write the whole set again."
            )


def _stated_length(url: str) -> int:
    found, path = filesystem(url)
    size = found.info(path)["size"]
    if size is None:
        raise DataError(
            f"the server of {url} does not state its length: download it by other means and give the local path"
        )
    return size


def _read_range(url: str, start: int, end: int) -> bytes:
    found, path = filesystem(url)
    block: Any = found.cat_file(path, start=start, end=end)
    if len(block) != end - start:
        raise OSError(f"bytes {start} to {end} were asked for, but {len(block)} bytes came")
    return block


def _retried(action: str, url: str, call: Callable[[], T], seconds: float = _SHORT_DEADLINE) -> T:
    """The result of `call`, tried up to five times with growing, jittered pauses, as long as the time lasts."""
    until = time.monotonic() + seconds
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except DataError:
            raise
        except Exception as error:
            pause = 0.3 * 2**attempt * random.uniform(0.5, 1.0)
            if is_local(url) or is_lasting(error) or attempt == _ATTEMPTS or time.monotonic() + pause > until:
                raise failure(action, url, error) from error
            time.sleep(pause)
    raise AssertionError("the loop above returns or raises")
