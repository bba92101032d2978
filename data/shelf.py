"""Which extents the cache folder holds: opening one makes room by removing those used longest ago, none in use."""

import errno
import fcntl
import shutil
import time
import uuid
from pathlib import Path

from data.errors import DataError
from data.extent import COUNTED, USE, Extent, Part
from data.folder import BUDGET_VARIABLE, cache_errors, locked, try_locked

_LOCK = "lock"
_REMOVED = ".removed-"
_ROOM_SECONDS = 120.0
_POLL_SECONDS = 0.05


def open_extent(part: Part, cache_dir: Path, budget: int) -> Extent:
    """The extent of a part, there or being filled from now on; waits up to two minutes for room.

    Args:
        part: What it holds.
        cache_dir: The cache folder of this node.
        budget: Bytes that all extents there may take together.
    """
    until = time.monotonic() + _ROOM_SECONDS
    while (extent := try_extent(part, cache_dir, budget)) is None:
        if time.monotonic() > until:
            raise DataError(
                f"the cache folder {cache_dir} has no room for {sum(part.files.values())} bytes of "
                f"{part.manifest.name!r}: the rest of its budget of {budget} bytes is in use by this and other "
                f"processes. Set {BUDGET_VARIABLE} higher, or wait until they end."
            )
        time.sleep(_POLL_SECONDS)
    return extent


def try_extent(part: Part, cache_dir: Path, budget: int) -> Extent | None:
    """The extent of a part, or None if what is in use leaves no room for it now."""
    folder = cache_dir / part.folder
    with cache_errors(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with locked(cache_dir / _LOCK, fcntl.LOCK_EX):
            return Extent(part, folder) if _make_room(cache_dir, folder, sum(part.files.values()), budget) else None


def _make_room(cache_dir: Path, folder: Path, size: int, budget: int) -> bool:
    """Removes extents until one of `size` bytes at `folder` fits; False if it is new and those in use leave no room."""
    for dead in cache_dir.glob(f"{_REMOVED}*"):
        shutil.rmtree(dead)
    sizes = {use.parent: _bytes(use.parent) for use in cache_dir.glob(f"*/*/{USE}")}
    needed = 0 if folder in sizes else size
    sizes.pop(folder, None)
    taken = sum(sizes.values()) + size
    oldest_first = sorted(sizes, key=lambda other: (other / USE).stat().st_mtime_ns)
    for other in oldest_first:
        if taken <= budget and shutil.disk_usage(cache_dir).free >= needed:
            break
        if _removed(other, cache_dir):
            taken -= sizes[other]
    if needed and taken > budget:
        return False
    if (free := shutil.disk_usage(cache_dir).free) < needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed, {free} are free")
    return True


def _bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in COUNTED if (folder / name).exists())


def _removed(folder: Path, cache_dir: Path) -> bool:
    """Removes an extent unless a process uses it. Opening one takes the cache's lock, which the caller holds."""
    use = try_locked(folder / USE, fcntl.LOCK_EX)
    if use is None:
        return False
    # By another name first, so that nothing half removed is found by its own after a kill.
    grave = cache_dir / f"{_REMOVED}{uuid.uuid4().hex}"
    folder.rename(grave)
    shutil.rmtree(grave)
    use.close()
    return True
