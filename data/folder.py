"""The cache folder of a node: where it lies, how large it may grow, its locks, and what its errors say."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data.errors import DataError
from data.store.failures import NO_SPACE

CACHE_VARIABLE = "BCM_CACHE_DIR"
BUDGET_VARIABLE = "BCM_CACHE_BUDGET"
DEFAULT_BUDGET = 64 * 2**30
"""Bytes: ImageNet-64 takes 16 GB decoded. No share of the disk, because nodes may have different ones."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])i?)?B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def default_cache_dir() -> Path:
    """BCM_CACHE_DIR if it is set, else `bcm` in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bcm"


def cache_budget() -> int:
    """Bytes that the cache of a node may take: BCM_CACHE_BUDGET (such as 500M or 1.5 TiB) if it is set, else 64 GiB."""
    text = os.environ.get(BUDGET_VARIABLE, "").strip()
    if not text:
        return DEFAULT_BUDGET
    size = _SIZE.fullmatch(text)
    budget = int(float(size[1]) * _UNITS[(size[2] or "").upper()]) if size else 0
    if budget < 1:
        raise DataError(f"{BUDGET_VARIABLE} is {text!r}: give a number of bytes greater than 0, such as 500M or 64G")
    return budget


def locked(path: Path, how: int) -> BinaryIO:
    """The file at `path`, made if need be, with a lock that closing it (or the end of the process) frees."""
    file = path.open("ab")
    try:
        fcntl.flock(file, how)
    except OSError:
        file.close()
        raise
    return file


def try_locked(path: Path, how: int) -> BinaryIO | None:
    """As `locked`, but None at once if another holds the lock."""
    try:
        return locked(path, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return None


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Turns what the operating system raises about the cache folder into a DataError."""
    try:
        yield
    except OSError as error:
        full = error.errno in NO_SPACE
        problem = "there is no space left" if full else f"{type(error).__name__}: {error.strerror or error}"
        raise DataError(
            f"cannot use the cache folder {folder}: {problem}. "
            f"{'Free some space, or set' if full else 'Set'} {CACHE_VARIABLE} to a folder on a local disk with room."
        ) from error
