"""The node-local cache: each node fetches, checks and decodes a split once, and all its processes map the same file.

Layout: `{cache_dir}/{manifest sha256}/{split}/` with `images.npy`, `labels.npy` and `whole.json`. The folder gets its
final name by one rename when everything in it is on the disk, so a process killed at any moment leaves nothing that is
taken for whole.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data import storage
from data.decode import decode_shard
from data.errors import DataError
from data.manifest import Manifest

CACHE_VARIABLE = "BCM_CACHE_DIR"

_IMAGES, _LABELS, _WHOLE = "images.npy", "labels.npy", "whole.json"
_BLOCK = 2**20
_BLOCKS_CHECKED = 256
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedSplit:
    """A decoded split, mapped read-only from the cache.

    Attributes:
        images: uint8 pixels of shape (n, C, H, W).
        labels: Classes, int64 of shape (n,).
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def default_cache_dir() -> Path:
    """BCM_CACHE_DIR if it is set, else `bcm` in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bcm"


def cached_split(url: str, manifest: Manifest, split: str, cache_dir: Path) -> CachedSplit:
    """The split of the data set at `url`, from the cache or put there now.

    Any number of processes may call this at once: one does the work. A damaged cache is made again.

    Args:
        url: Where the shards are.
        manifest: Their manifest.
        split: Name of the split.
        cache_dir: Folder on a disk of this node.
    """
    shape = (manifest.split(split).count, manifest.channels, manifest.resolution, manifest.resolution)
    home = cache_dir / manifest.sha256
    final = home / split
    with _explained(cache_dir), _locked(home / f"{split}.lock"):
        if not _is_whole(final, shape):
            _build(url, manifest, split, final)
        images, labels = (np.load(final / name, mmap_mode="r", allow_pickle=False) for name in (_IMAGES, _LABELS))
    return CachedSplit(images=images.view(np.ndarray), labels=np.array(labels))


@contextmanager
def _explained(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in _NO_SPACE
        problem = "there is no space left" if full else f"{type(error).__name__}: {error.strerror or error}"
        raise DataError(
            f"cannot use the cache folder {cache_dir}: {problem}. "
            f"{'Free some space, or set' if full else 'Set'} {CACHE_VARIABLE} to a folder on a local disk with room."
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes; the kernel frees it if its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _checksum(path: Path) -> str:
    """Hash of a file: all of it up to 256 MiB, else 256 blocks spread evenly over it, so that starting is quick."""
    size = path.stat().st_size
    step = max(1, -(-size // (_BLOCK * _BLOCKS_CHECKED))) * _BLOCK
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _is_whole(folder: Path, shape: tuple[int, ...]) -> bool:
    """Whether a cached split is there, with the right shape and the checksums noted when it was made."""
    try:
        noted = json.loads((folder / _WHOLE).read_bytes())
        if noted != {name: _checksum(folder / name) for name in (_IMAGES, _LABELS)}:
            return False
        images, labels = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in (_IMAGES, _LABELS))
    except (OSError, ValueError, EOFError):
        return False
    return (images.dtype, images.shape) == (np.uint8, shape) and (labels.dtype, labels.shape) == (np.int64, shape[:1])


def _build(url: str, manifest: Manifest, split: str, final: Path) -> None:
    """Makes the split in a working folder and renames it. Called under the lock, so other working folders are dead."""
    home = final.parent
    for dead in home.glob(f".{split}.*"):
        shutil.rmtree(dead)
    work = home / f".{split}.{os.getpid()}"
    work.mkdir()
    try:
        _check_space(manifest, split, work)
        _decode_into(work, url, manifest, split)
        if final.exists():
            final.rename(home / f".{split}.damaged")
        work.rename(final)
        _flush_folder(home)
        shutil.rmtree(home / f".{split}.damaged", ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_space(manifest: Manifest, split: str, folder: Path) -> None:
    part = manifest.split(split)
    needed = part.count * manifest.channels * manifest.resolution**2 + max(shard.bytes for shard in part.shards)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed, {free} are free")


def _decode_into(work: Path, url: str, manifest: Manifest, split: str) -> None:
    part = manifest.split(split)
    shape = (part.count, manifest.channels, manifest.resolution, manifest.resolution)
    fetched = work / "shard.tar"
    labels: list[NDArray[np.int64]] = []
    # Plain writes rather than a writable map: on a full disk a map kills the process with SIGBUS.
    with (work / _IMAGES).open("xb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for shard in part.shards:
            source = storage.join(url, shard.path)
            storage.fetch(source, shard.bytes, shard.sha256, fetched)
            images, shard_labels = decode_shard(fetched, source, shard, manifest)
            file.write(images.data)
            labels.append(shard_labels)
        _flush(file)
    fetched.unlink()
    with (work / _LABELS).open("xb") as file:
        np.save(file, np.concatenate(labels), allow_pickle=False)
        _flush(file)
    with (work / _WHOLE).open("xb") as file:
        file.write(json.dumps({name: _checksum(work / name) for name in (_IMAGES, _LABELS)}).encode())
        _flush(file)
    _flush_folder(work)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
