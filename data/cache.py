"""The node-local cache: each node fetches, checks and decodes a shard once, and all its processes map the same file.

There is one file for each shard and form, `{hash of what it holds}.{form}`: labels, then pixels or the tar's own bytes,
then the SHA-256 of both, which every process compares when it first maps the file. It is made under a temporary name
and renamed when it is whole: if it exists it is whole. What was used longest ago goes first when the budget needs room;
whoever has it mapped keeps it. The cache knows no seed and no order.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data import store
from data.decode import decode_images, mapped, read_labels
from data.errors import DataError, StorageError
from data.manifest import Manifest

CACHE_VARIABLE = "BCM_CACHE_DIR"
BUDGET_VARIABLE = "BCM_CACHE_BUDGET"
DEFAULT_BUDGET = 64 * 2**30
"""Bytes: ImageNet-64 takes 16 GB decoded."""
LEAST_SHARDS = 3
"""A cache must hold so many shards: one that is read, one that is fetched, and one more."""

Taken = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images of shape (n, C, H, W) and their labels of shape (n,)."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])i?)?B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_FORMS = ("pixels", "tar")
_PARTIAL, _FETCHED = ".partial", ".fetched"
_HASH_BYTES = 32
_BLOCK_BYTES = 2**20
_ROOM_SECONDS, _POLL_SECONDS = 120.0, 0.05
_LOOK_SECONDS = 1.0
"""How often a process notes that it still uses a shard, and lets go of those that were removed."""


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


class ShardCache:
    """A split as this node holds it; what is missing is fetched when it is asked for. Safe in several threads.

    Attributes:
        budget: Bytes that all shards in the cache folder may take together. Beside them stands, while a shard is made,
            the copy of its tar; where the disk has no room for it, others make room.
    """

    def __init__(
        self, url: str, manifest: Manifest, split: str, cache_dir: Path | None = None, budget: int | None = None
    ) -> None:
        """Opens a split; nothing is fetched yet.

        Args:
            url: Where the data set is.
            manifest: Its manifest.
            split: Name of the split.
            cache_dir: Folder on a disk of this node; BCM_CACHE_DIR or ~/.cache/bcm if it is None.
            budget: BCM_CACHE_BUDGET or 64 GiB if it is None. It may differ from node to node.
        """
        self.budget = cache_budget() if budget is None else budget
        self._url, self._manifest, self._shards = manifest.place(url), manifest, manifest.split(split).shards
        self._dir = cache_dir or default_cache_dir()
        self._shape = (manifest.channels, manifest.resolution, manifest.resolution)
        counts = np.array([shard.count for shard in self._shards], np.int64)
        self._rows = np.concatenate([[0], counts.cumsum()])
        pixels, tars = counts * int(np.prod(self._shape)), np.array([shard.bytes for shard in self._shards], np.int64)
        self._decoded = bool(pixels.sum() <= max(self.budget, tars.sum()))
        self.sizes = (pixels if self._decoded else tars) + 8 * counts + _HASH_BYTES
        """Bytes that each shard takes, int64 of shape (shards,)."""
        if (needed := int(np.sort(self.sizes)[-LEAST_SHARDS:].sum())) > self.budget:
            least = min(LEAST_SHARDS, len(self._shards))
            raise DataError(
                f"a cache of {self.budget} bytes is too small for {manifest.name!r}: its {least} largest shards must "
                f"fit. Set {BUDGET_VARIABLE} to {needed} or more."
            )
        self._open: dict[int, Taken] = {}
        self._looked: dict[int, float] = {}
        self._failed: dict[int, tuple[float, StorageError]] = {}
        form = f"{self._shape} {len(manifest.class_names)}"
        names = [hashlib.sha256(f"{s.sha256} {s.places} {form}".encode()).hexdigest() for s in self._shards]
        self._paths = [self._dir / f"{name[:40]}.{_FORMS[not self._decoded]}" for name in names]
        self._pruned = 0.0
        self._decoders = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="bcm-decode")

    def __len__(self) -> int:
        """Number of images."""
        return int(self._rows[-1])

    def take(self, ids: NDArray[np.int64]) -> Taken:
        """Images and labels of these ids, copied."""
        images, labels = np.empty((len(ids), *self._shape), np.uint8), np.empty(len(ids), np.int64)
        numbers = np.searchsorted(self._rows, ids, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        wanted, starts = np.unique(numbers[order], return_index=True)
        decoding: list[tuple[NDArray[np.int64], Future[NDArray[np.uint8]]]] = []
        for number, places in zip(wanted.tolist(), np.split(order, starts[1:]), strict=True):
            content, of_shard = self.content(number)
            rows = ids[places] - self._rows[number]
            labels[places] = of_shard[rows]
            if self._decoded:
                images[places] = content[rows]
            else:  # decoders run without the interpreter's lock, and nothing is forked
                decoding.append((places, self._decoders.submit(self._decode, number, content, rows)))
        for places, decoded in decoding:
            images[places] = decoded.result()
        return images, labels

    def shards(self) -> Iterator[Taken]:
        """All images and labels, in their order, one shard after another; not to be written to."""
        for number in range(len(self._shards)):
            content, labels = self.content(number)
            yield (content if self._decoded else self._decode(number, content, np.arange(len(labels)))), labels

    def _decode(self, number: int, tar: NDArray[np.uint8], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        shard = self._shards[number]
        url = store.join(self._url, shard.path)
        return decode_images(tar, shard.spans[rows], self._manifest, url)

    def content(self, number: int) -> Taken:
        """Pixels (n, C, H, W) or the tar's bytes, and labels, of a shard that is in the cache from now on."""
        now, opened = time.monotonic(), self._open.get(number)
        if opened is not None and now < self._looked[number] + _LOOK_SECONDS:
            return opened
        if now > self._pruned + _LOOK_SECONDS:
            self._pruned = now
            for other in list(self._open):
                if not self._paths[other].exists():
                    self._open.pop(other, None)
        try:
            if (opened := self._open.get(number)) is None:
                opened = self._verified(number, self._paths[number])
            else:
                with suppress(FileNotFoundError):
                    os.utime(self._paths[number])
        except OSError as error:
            full = error.errno in store.NO_SPACE
            problem = "there is no space left" if full else f"{type(error).__name__}: {error.strerror or error}"
            raise DataError(
                f"cannot use the cache folder {self._dir}: {problem}. {'Free some space, or set' if full else 'Set'} "
                f"{CACHE_VARIABLE} to a folder on a local disk with room."
            ) from error
        self._looked[number] = now
        self._open[number] = opened
        return opened

    def _verified(self, number: int, path: Path) -> Taken:
        """The file of a shard, mapped; one that is damaged is made anew."""
        began = time.monotonic()
        while True:
            made = not path.exists() and self._make(number, path, began)
            try:
                raw = mapped(path)
                os.utime(path)
            except FileNotFoundError:  # another process has removed it just now
                continue
            if len(raw) == self.sizes[number] and (
                made or hashlib.sha256(raw[:-_HASH_BYTES].data).digest() == raw[-_HASH_BYTES:].tobytes()
            ):
                break
            path.unlink(missing_ok=True)
        split = 8 * self._shards[number].count
        content = raw[split:-_HASH_BYTES]
        return (content.reshape(-1, *self._shape) if self._decoded else content), raw[:split].view(np.int64)

    def _make(self, number: int, path: Path, began: float) -> bool:
        """Makes the file of a shard, unless another process or thread does; whether it was this one.

        What another thread has tried in vain since this one `began`, or just before, is not tried as long again.
        """
        failed, error = self._failed.get(number, (0.0, None))
        if error and failed > began - _LOOK_SECONDS:
            raise StorageError(str(error)) from error
        self._dir.mkdir(parents=True, exist_ok=True)
        partial, shard, made = path.with_name(path.name + _PARTIAL), self._shards[number], False
        with partial.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # which the kernel frees when its holder ends, however it ends
            if not partial.exists() or not os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                return False
            # From here on the names of what is half-made belong to this call, until the partial file has gone.
            if path.exists():
                partial.unlink()
                return False
            for left in self._dir.glob(f"*{path.name}{_FETCHED}*"):  # by a dead process
                left.unlink(missing_ok=True)
            os.truncate(file.fileno(), 0)
            copy = path.with_name(path.name + _FETCHED)
            try:
                self._make_room(int(self.sizes[number]), shard.bytes, file)
                store.fetch(store.join(self._url, shard.path), shard.bytes, shard.sha256, copy, durable=False)
                self._write(number, copy, partial)
                made = True
            except DataError as error:
                if isinstance(error, StorageError):
                    self._failed[number] = time.monotonic(), error
                if isinstance(error.__cause__, OSError) and error.__cause__.errno in store.NO_SPACE:
                    raise error.__cause__ from None  # the disk that is full is that of the cache
                raise
            finally:
                copy.unlink(missing_ok=True)
                if not made:
                    partial.unlink(missing_ok=True)
            with (self._dir / "lock").open("ab") as lock:  # or who counts what is there might miss it
                fcntl.flock(lock, fcntl.LOCK_EX)
                partial.rename(path)
        return True

    def _write(self, number: int, copy: Path, partial: Path) -> None:
        """Labels, content and their hash; with calls, as a full disk answers writing through a map by SIGBUS."""
        shard, raw, digest = self._shards[number], mapped(copy), hashlib.sha256()
        labels = read_labels(copy, store.join(self._url, shard.path), shard, self._manifest)
        step = max(1, _BLOCK_BYTES // int(np.prod(self._shape)))
        rows = np.arange(shard.count)
        blocks = (self._decode(number, raw, rows[at : at + step]) for at in range(0, shard.count, step))
        with partial.open("r+b") as file:
            for block in chain([labels], blocks if self._decoded else [raw]):  # one block in memory at a time
                digest.update(block.data)
                file.write(block.data)
            file.write(digest.digest())

    def _make_room(self, size: int, copy_bytes: int, reserved: BinaryIO) -> None:
        """Removes what was used longest ago until a file of `size` bytes fits, and gives `reserved` that length.

        What dead processes left half-made is removed too; what living ones make is counted, and on the disk, the copies
        that all are made from.
        """
        until = time.monotonic() + _ROOM_SECONDS
        while time.monotonic() < until:
            with (self._dir / "lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                whole: list[tuple[int, int, Path]] = []
                making = size
                for path in self._dir.iterdir():
                    with suppress(FileNotFoundError):
                        status = path.stat()
                        if path.suffix.lstrip(".") in _FORMS:
                            whole.append((status.st_mtime_ns, status.st_size, path))
                        elif path.suffix == _PARTIAL:
                            with path.open("r+b") as file:
                                try:
                                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                                except BlockingIOError:
                                    making += status.st_size
                                else:
                                    if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                                        for copy in self._dir.glob(f"*{path.stem}{_FETCHED}*"):
                                            copy.unlink(missing_ok=True)
                                        path.unlink()
                taken = making + sum(length for _, length, _ in whole)
                needed = making + making * copy_bytes // size
                for _, length, path in sorted(whole):
                    if taken <= self.budget and shutil.disk_usage(self._dir).free >= needed:
                        break
                    path.unlink(missing_ok=True)
                    taken -= length
                if taken <= self.budget:
                    if (free := shutil.disk_usage(self._dir).free) < needed:
                        raise OSError(errno.ENOSPC, f"{needed} bytes are needed, {free} are free")
                    os.truncate(reserved.fileno(), size)
                    return
            time.sleep(_POLL_SECONDS)
        raise DataError(
            f"the cache folder {self._dir} has no room for {size} bytes of {self._manifest.name!r}: the rest of its "
            f"budget of {self.budget} bytes is being filled by other processes. Set {BUDGET_VARIABLE} higher, or wait "
            "until they end."
        )
