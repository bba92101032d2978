"""Reads, writes and lists at any URL (see `data.store.filesystems` for what that may be).

Every failure leaves as a DataError that names the URL and a remedy. What a further try can mend is tried again, up to a
deadline, and counted (`data.store.transfer`).
"""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data.errors import DataError
from data.store.failures import NO_SPACE, failure
from data.store.filesystems import BUCKET_STORES, absolute, arrow_filesystem, filesystem, is_local, join, scheme
from data.store.transfer import (
    RANGE_BYTES,
    Version,
    fetch,
    read_bytes,
    read_range,
    replacing,
    retried,
    retries,
    version,
    within,
)

__all__ = [
    "NO_SPACE",
    "RANGE_BYTES",
    "Version",
    "absolute",
    "arrow_filesystem",
    "check_writable",
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
    "retries",
    "version",
    "walk",
    "within",
    "write_bytes",
    "write_json",
]

_CHECK_SECONDS = 20.0


@contextmanager
def _unless_absent() -> Iterator[None]:
    """Passes over the DataError of what is not there."""
    try:
        yield
    except DataError as error:
        if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise


def exists(url: str) -> bool:
    """Whether there is a file or folder at `url`."""
    files, path = filesystem(url, reading=True)
    with _unless_absent():
        retried("read", url, partial(files.info, path))
        return True
    return False


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
    retried("write", url, partial(_put, url, payload))


def _put(url: str, payload: bytes) -> None:
    files, path = filesystem(url)
    if is_local(url):
        with replacing(Path(path)) as file:
            file.write(payload)
        return
    if scheme(url) not in BUCKET_STORES:  # where makedirs would try to create the bucket
        files.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
    files.pipe_file(path, payload)


def write_json(url: str, value: Any) -> None:
    """Writes a JSON value, indented, with sorted keys."""
    write_bytes(url, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def remove(url: str) -> None:
    """Removes the file at `url`; it is no error if there is none."""
    files, path = filesystem(url, reading=True)
    with _unless_absent():
        retried("remove", url, partial(files.rm_file, path))


def _entries(url: str) -> list[dict[str, Any]]:
    files, path = filesystem(url, reading=True)
    with _unless_absent():
        entries = retried("list", url, partial(files.ls, path, detail=True))
        return [entry for entry in entries if entry["name"].strip("/") != path.strip("/")]
    return []


def list_names(url: str) -> list[str]:
    """Sorted names directly under `url`, [] if it is absent. Hidden names (unfinished writes) are left out."""
    names = {PurePosixPath(entry["name"]).name for entry in _entries(url)}
    return sorted(name for name in names if not name.startswith("."))


def file_sizes(url: str) -> dict[str, int]:
    """Bytes of each file directly under `url`, by name; empty if it is absent. It costs one listing."""
    return {PurePosixPath(entry["name"]).name: entry["size"] for entry in _entries(url) if entry["type"] == "file"}


def walk(url: str) -> dict[str, int]:
    """Bytes of each file anywhere under `url`, by its path from there, sorted; {"": size} if `url` is a file itself."""
    files, root = filesystem(url, reading=True)
    infos = retried("list", url, partial(files.find, root, detail=True))
    root = root.rstrip("/")
    return {path.removeprefix(root).lstrip("/"): info["size"] for path, info in sorted(infos.items())}


def check_writable(url: str) -> None:
    """Writes a small file under `url`, reads it and removes it; a DataError within about 20 seconds if that fails."""
    files, root = filesystem(url)
    name = f".bcm-write-check-{uuid.uuid4().hex}"

    def attempt() -> None:
        _put(join(url, name), b"written to see whether this place can be written\n")
        files.cat_file(join(root, name))
        files.rm_file(join(root, name))

    try:
        # A server that never answers would hold this thread for longer than a user waits.
        within(_CHECK_SECONDS, attempt)
    except Exception as error:
        raise failure("write to", url, error) from error
