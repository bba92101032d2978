"""Some shards of a split on a disk of this node: filled by one process, read by many while it grows.

Its files have their final length from the start. A shard counts as there when its byte in `ready` is set, which happens
after its content is written and its hash is noted in `checks`. So a process killed at any moment leaves nothing that is
taken for whole, and the next one goes on where it stopped.
"""

import fcntl
import hashlib
import json
import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from data import store
from data.decode import decode_images, mapped, read_labels
from data.encoded import EncodedImages
from data.folder import cache_errors, locked, try_locked
from data.manifest import Manifest, Shard
from data.plan import CHECK_BYTES, decoded_bytes, label_bytes

USE = "use"
"""Name of the file that every reader holds a shared lock on."""

_BUILD, _STAMP = "build", "stamp"
_CONTENT, _LABELS, _CHECKS, _READY = COUNTED = ("content", "labels", "checks", "ready")
"""Names of the files whose lengths count against the budget."""

_BLOCK = 8 * 2**20
_SAMPLED_BYTES = 256 * 2**20
_POLL_SECONDS = 0.002
_TAKE_OVER_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Part:
    """What an extent holds.

    Attributes:
        url: Where the data set is.
        manifest: Its manifest.
        split: Name of the split.
        shards: Numbers of the shards, ascending.
        decoded: Whether as pixels, else as the bytes of the shards.
    """

    url: str
    manifest: Manifest
    split: str
    shards: tuple[int, ...]
    decoded: bool

    @cached_property
    def entries(self) -> tuple[Shard, ...]:
        """The manifest's entries of the shards."""
        every = self.manifest.split(self.split).shards
        return tuple(every[shard] for shard in self.shards)

    @property
    def folder(self) -> Path:
        """Its place in the cache: sets, splits, choices of shards and forms never meet."""
        form = "decoded" if self.decoded else "encoded"
        if len(self.shards) == len(self.manifest.split(self.split).shards):
            return Path(self.manifest.sha256, f"{self.split}-{form}")
        chosen = hashlib.sha256(json.dumps(self.shards).encode()).hexdigest()
        return Path(self.manifest.sha256, f"{self.split}-{form}-{chosen[:32]}")

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """First byte of the content of each shard, and the length of all, int64 of shape (shards + 1,)."""
        sizes = [decoded_bytes(self.manifest, entry) if self.decoded else entry.bytes for entry in self.entries]
        return np.cumsum([0, *sizes], dtype=np.int64)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Number of images before each shard, and that of all, int64 of shape (shards + 1,)."""
        return np.cumsum([0, *(entry.count for entry in self.entries)], dtype=np.int64)

    @property
    def files(self) -> dict[str, int]:
        """Length of each file."""
        count = len(self.shards)
        labels = sum(label_bytes(entry) for entry in self.entries)
        return {_CONTENT: int(self.starts[-1]), _LABELS: labels, _CHECKS: CHECK_BYTES * count, _READY: count}


class Extent:
    """Some shards of a split in the cache. All methods may be called from any thread."""

    def __init__(self, part: Part, folder: Path) -> None:
        """Opens or makes it; the caller holds the lock of the whole cache, so nobody opens or removes it meanwhile."""
        self.part, self._folder = part, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._use = locked(folder / USE, fcntl.LOCK_SH)
        weakref.finalize(self, self._use.close)
        os.utime(folder / USE)
        for name, size in part.files.items():
            _make(folder / name, size)
        self._content = mapped(folder / _CONTENT)
        self._checks = mapped(folder / _CHECKS).reshape(-1, CHECK_BYTES)
        self._ready = mapped(folder / _READY)
        self.labels = mapped(folder / _LABELS).view(np.int64)
        self.images = self._images()
        self._first: dict[int, int] = {}
        self._queue: list[int] = []
        self._queue_lock = threading.Lock()
        self._failure: BaseException | None = None
        self._closed = False
        leading = try_locked(folder / _BUILD, fcntl.LOCK_EX)
        if leading:
            # Whoever opens it from now on trusts only what this process has checked.
            self._write(_READY, 0, bytes(len(part.shards)))
        self._tending = threading.Thread(target=self._tend, args=(leading,), name="bcm-cache", daemon=True)
        self._tending.start()

    def _images(self) -> NDArray[np.uint8]:
        part = self.part
        if part.decoded:
            return self._content.reshape(-1, part.manifest.channels, part.manifest.resolution, part.manifest.resolution)
        starts = zip(part.entries, part.starts[:-1].tolist(), strict=True)
        offsets = np.concatenate([np.array(entry.offsets, np.int64) + start for entry, start in starts])
        sizes = np.concatenate([np.array(entry.sizes, np.int64) for entry in part.entries])
        images = EncodedImages(raw=self._content, offsets=offsets, sizes=sizes, manifest=part.manifest, url=part.url)
        return cast(NDArray[np.uint8], images)  # in all that readers use: indexing along the first axis, len and shape

    def is_whole(self) -> bool:
        """Whether every shard is there."""
        return bool(self._ready.all())

    def wait(self, places: NDArray[np.int64]) -> None:
        """Returns when the shards at these places are there; raises what keeps them from coming."""
        while not self._ready[places].all():
            if self._failure is not None:
                raise self._failure
            time.sleep(_POLL_SECONDS)

    def finish(self) -> None:
        """Returns when every shard is there; raises what keeps them from coming."""
        self._tending.join()
        if self._failure is not None:
            raise self._failure

    def prefer(self, places: Sequence[int]) -> None:
        """Asks for the shards at these places first, in this order."""
        with self._queue_lock:
            self._first = {place: turn for turn, place in enumerate(places)}
            self._queue = self._sorted(self._queue)

    def _sorted(self, places: Iterable[int]) -> list[int]:
        """The last is to be fetched first."""
        return sorted(places, key=lambda place: self._first.get(place, len(self._first) + place), reverse=True)

    def close(self) -> None:
        """Lets the cache remove it; its arrays must not be used any more."""
        self._closed = True
        with self._queue_lock:
            self._queue.clear()
        self._use.close()

    def _tend(self, leading: BinaryIO | None) -> None:
        """Fills the extent, or waits for the process that does and takes over if that one ends before its time."""
        try:
            with cache_errors(self._folder):
                while not self._closed and not self.is_whole():
                    leading = leading or try_locked(self._folder / _BUILD, fcntl.LOCK_EX)
                    if leading:
                        self._fill()
                    else:
                        time.sleep(_TAKE_OVER_SECONDS)
        except BaseException as error:
            self._failure = error
        finally:
            if leading:
                leading.close()

    def _fill(self) -> None:
        """Makes every shard ready. Called with the lock for building, so what other builders left behind is dead."""
        for name in ("*.tar", ".*.tmp"):
            for dead in self._folder.glob(name):
                dead.unlink()
        if self._is_trusted():
            self._write(_READY, 0, b"\1" * len(self.part.shards))
            return
        with self._queue_lock:
            self._queue = self._sorted(np.flatnonzero(self._ready == 0).tolist())
        failures: list[BaseException] = []
        workers = [
            threading.Thread(target=self._work, args=(failures,), name="bcm-cache-shard", daemon=True)
            for _ in range(max(2, min(8, os.cpu_count() or 1)))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if failures:
            raise failures[0]
        if self.is_whole():
            self._stamp()

    def _work(self, failures: list[BaseException]) -> None:
        while True:
            with self._queue_lock:
                if not self._queue or failures or self._closed:
                    return
                place = self._queue.pop()
            try:
                self._put(place)
            except BaseException as error:
                failures.append(error)

    def _put(self, place: int) -> None:
        """Makes one shard ready: as it lies there if it agrees with its check, else fetched anew."""
        if not self._agrees(place):
            self._write(_CHECKS, place * CHECK_BYTES, bytes(CHECK_BYTES))
            self._write(_CHECKS, place * CHECK_BYTES, self._fetched(place))
        self._write(_READY, place, b"\1")

    def _fetched(self, place: int) -> bytes:
        """Fetches a shard, writes its content and labels, and returns their hash."""
        part, shard = self.part, self.part.entries[place]
        source, copy = store.join(part.url, shard.path), self._folder / f"{place}.tar"
        try:
            store.fetch(source, shard.bytes, shard.sha256, copy, durable=False)
            labels = read_labels(copy, source, shard, part.manifest)
            digest, at = hashlib.sha256(), int(part.starts[place])
            for block in _blocks(mapped(copy), shard, part, source):
                self._write(_CONTENT, at, block.data)
                digest.update(block.data)
                at += block.nbytes
        finally:
            copy.unlink(missing_ok=True)
        self._write(_LABELS, int(part.rows[place]) * labels.itemsize, labels.data)
        digest.update(labels.data)
        return digest.digest()

    def _agrees(self, place: int) -> bool:
        """Whether a shard's content and labels have the hash that was noted when they were written."""
        check = self._checks[place].tobytes()
        if not any(check):
            return False
        content, rows = self.part.starts[place : place + 2], self.part.rows[place : place + 2]
        digest = hashlib.sha256(self._content[content[0] : content[1]].data)
        digest.update(self.labels[rows[0] : rows[1]].data)
        return digest.digest() == check

    def _is_trusted(self) -> bool:
        """Whether it was whole once, nobody wrote to it since, and up to 256 MiB spread evenly over it are right."""
        try:
            if json.loads((self._folder / _STAMP).read_bytes()) != self._times():
                return False
        except (OSError, ValueError):
            return False
        step = -(-int(self.part.starts[-1]) // _SAMPLED_BYTES)
        return all(self._agrees(place) for place in range(0, len(self.part.shards), max(1, step)))

    def _times(self) -> dict[str, int]:
        return {name: (self._folder / name).stat().st_mtime_ns for name in (_CONTENT, _LABELS, _CHECKS)}

    def _stamp(self) -> None:
        """Notes that it is whole and on the disk."""
        for name in (_CONTENT, _LABELS, _CHECKS):
            with (self._folder / name).open("rb") as file:
                os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            store.write_json(str(self._folder / _STAMP), self._times())

    def _write(self, name: str, at: int, content: bytes | memoryview) -> None:
        """Writes with a call and not through a map, which would kill the process with SIGBUS on a full disk."""
        with (self._folder / name).open("r+b", buffering=0) as file:
            rest = memoryview(content).cast("B")
            while rest:
                written = os.pwrite(file.fileno(), rest, at)
                rest, at = rest[written:], at + written


def _make(path: Path, size: int) -> None:
    """A file of this length; one of another length is replaced, not cut, as another process may have it mapped."""
    with suppress(FileNotFoundError):
        if path.stat().st_size == size:
            return
        path.unlink()
    with path.open("xb") as file:
        file.truncate(size)


def _blocks(raw: NDArray[np.uint8], shard: Shard, part: Part, url: str) -> Iterator[NDArray[np.uint8]]:
    """The content of a shard in pieces: its pixels, or its bytes."""
    if not part.decoded:
        yield from (raw[start : start + _BLOCK] for start in range(0, len(raw), _BLOCK))
        return
    offsets, sizes = np.array(shard.offsets, np.int64), np.array(shard.sizes, np.int64)
    step = max(1, _BLOCK * shard.count // decoded_bytes(part.manifest, shard))
    for start in range(0, shard.count, step):
        rows = slice(start, start + step)
        yield decode_images(raw, offsets[rows], sizes[rows], part.manifest, url)
