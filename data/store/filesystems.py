"""The only user of fsspec: URL -> file system and the path inside it.

A URL is a local path, taken letter by letter, `file://...`, where %20 is a blank, `s3://bucket/path` or anything else
that fsspec knows. Credentials and endpoints come from the environment alone (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...);
`anonymous+s3://bucket/path` needs no credentials, for buckets that are public. No file system object is kept between
calls, so nothing is carried across a fork.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow.fs

from data.errors import DataError
from data.store.failures import failure

# Servers other than Amazon's refuse the newer checksum trailers, or answer a range with the checksum of the whole file.
_S3_CONFIG: Mapping[str, Any] = {
    "connect_timeout": 5,
    "retries": {"total_max_attempts": 1},
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}
_WRITE_SECONDS = 15.0
_READ_SECONDS = 5.0
"""A server that sends nothing for so long is asked again."""

_ANONYMOUS = "anonymous+"
S3 = ("s3", "s3a", f"{_ANONYMOUS}s3")
WEB = ("http", "https")
BUCKET_STORES = (*S3, "gs", "gcs", "az", "abfs", "abfss", "adl")
"""Schemes of object stores, which have buckets and no folders."""


def scheme(url: str) -> str:
    """What stands before `://`, in lower case; "file" for a path."""
    return url.partition("://")[0].lower() if "://" in url else "file"


def filesystem(url: str, *, reading: bool = False) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path inside it.

    For reading, it neither waits for long nor tries again, as `data.store.transfer` does that.
    """
    if not url.strip():
        raise DataError("the storage URL is empty: give a path or a URL such as s3://bucket/folder")
    if is_local(url):
        files, (_, sign, rest) = fsspec.filesystem("file"), url.partition("://")
        return files, files._strip_protocol(unquote(re.sub("^localhost/", "/", rest)) if sign else url)
    kind = scheme(url)
    if "@" in urlsplit(url).netloc:
        raise DataError(
            f"the {kind} URL holds credentials (a part before '@'): give them in the environment instead, for "
            "example as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if kind in BUCKET_STORES and not urlsplit(url).netloc:
        raise DataError(f"{url} names no bucket: write {kind}://bucket/folder")
    if "::" in url and kind not in BUCKET_STORES:
        raise DataError(f"{url} chains several file systems, which is not supported: give one plain URL")
    options: dict[str, Any] = {}
    reader, asked = kind, url
    if kind in S3:
        silence = _READ_SECONDS if reading else _WRITE_SECONDS
        # Listings are never cached because other processes write too.
        options = {"use_listings_cache": False, "config_kwargs": {**_S3_CONFIG, "read_timeout": silence}}
        if kind.startswith(_ANONYMOUS):
            options["anon"], reader, asked = True, "s3", url[len(_ANONYMOUS) :]
    try:
        # fsspec's `url_to_fs` would take a name with "::" for a chain.
        found: Any = fsspec.get_filesystem_class(reader)
        files, path = found(**{**found._get_kwargs_from_urls(asked), **options}), found._strip_protocol(asked)
    except Exception as error:  # fsspec and its plug-ins have no common base
        raise failure("open", url, error) from error
    if reading and kind in S3:
        files.retries = 1
    return files, path


def anonymous(url: str) -> str:
    """The S3 URL under which a public bucket is read without keys."""
    if scheme(url) not in S3:
        raise DataError(f"{url or 'no source'} is not in a bucket: only an s3:// URL can be read without keys")
    return url if url.startswith(_ANONYMOUS) else f"{_ANONYMOUS}s3://{url.partition('://')[2]}"


def is_local(url: str) -> bool:
    """Whether a URL is a path on this machine."""
    return scheme(url) in ("file", "local")


def absolute(url: str) -> str:
    """A local path made absolute (without `file://`); any other URL as it is, without a slash at its end."""
    return str(Path(filesystem(url)[1])) if is_local(url) else re.sub("(?<=[^:/])/+$", "", url)


def join(url: str, *parts: str) -> str:
    """`url` with path parts added."""
    if not url.strip():
        raise DataError("the storage URL is empty: give a path or a URL such as s3://bucket/folder")
    if is_local(url) and "://" in url:
        url = absolute(url)  # the parts are names, with nothing to be unquoted
    root = url if url.endswith("://") else url.rstrip("/") + "/"
    return root + "/".join(part.strip("/") for part in parts)


def arrow_filesystem(url: str) -> tuple[pyarrow.fs.FileSystem | None, str]:
    """What Ray's RunConfig wants: (None, absolute path) for a local path, else (file system, path inside it).

    The file system pickles without credentials: each process that unpickles it reads them from its own environment.
    """
    if is_local(url):
        return None, absolute(url)
    files, path = filesystem(url)
    if {"key", "secret", "token"} & set(files.storage_options):
        raise DataError(
            "fsspec's own settings (FSSPEC_S3_* or its configuration file) hold credentials, which would be written "
            "into Ray's files: give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment instead"
        )
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files)), path
