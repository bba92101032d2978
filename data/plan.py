"""What the cache budget allows: a pure function of the manifest and the budget, so that every node plans the same."""

from dataclasses import dataclass

from data.errors import DataError
from data.folder import BUDGET_VARIABLE
from data.manifest import Manifest, Shard
from data.order import Shuffle

FIRST_WINDOW_BYTES = 64 * 2**20
"""Decoded bytes of a window in epoch 0 of a resident split: training begins when the first one is there."""
WINDOWS_HELD = 3
"""One that a slow worker still reads, one that most read, and the next one, which is being fetched."""

CHECK_BYTES = 32
"""The cache notes a hash of each shard, and in one byte more whether it is there."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a split is held on a node.

    Attributes:
        decoded: Whether as pixels, else as the bytes of the shards.
        resident: Whether all of it, else a moving window of shards.
        shuffle: The windows of the order.
    """

    decoded: bool
    resident: bool
    shuffle: Shuffle


def decoded_bytes(manifest: Manifest, shard: Shard) -> int:
    """Bytes of the pixels of a shard."""
    return shard.count * manifest.channels * manifest.resolution**2


def label_bytes(shard: Shard) -> int:
    """Bytes of the labels of a shard."""
    return 8 * shard.count


def held_bytes(manifest: Manifest, shard: Shard, decoded: bool) -> int:
    """Bytes that a shard takes in the cache."""
    content = decoded_bytes(manifest, shard) if decoded else shard.bytes
    return content + label_bytes(shard) + CHECK_BYTES + 1


def plan(manifest: Manifest, split: str, budget: int) -> Plan:
    """The plan for a split: decoded if it fits, else encoded if that fits, else a moving window of the smaller form.

    Each split has the share of the budget that its number of images gives it, so that all can be held at once. A moving
    window takes a third of the share. Its number of shards is a power of two, so that small changes of the budget leave
    the order as it is.
    """
    shards = manifest.split(split).shards
    share = budget * manifest.split(split).count // sum(part.count for part in manifest.splits.values())
    sizes = {form: [held_bytes(manifest, shard, form) for shard in shards] for form in (True, False)}
    first = max(1, FIRST_WINDOW_BYTES * len(shards) // sum(sizes[True]))
    counts = tuple(shard.count for shard in shards)
    for decoded in (True, False):
        if sum(sizes[decoded]) <= share:
            shuffle = Shuffle(counts=counts, window=len(shards), first_window=min(first, len(shards)))
            return Plan(decoded=decoded, resident=True, shuffle=shuffle)
    decoded = sum(sizes[True]) <= sum(sizes[False])
    window = share // WINDOWS_HELD // max(sizes[decoded])
    if window < 1:
        needed = -(-WINDOWS_HELD * max(sizes[decoded]) * budget // max(1, share))
        raise DataError(
            f"a cache of {budget} bytes is too small for {manifest.name!r}: {WINDOWS_HELD} shards of its split "
            f"{split!r} must fit into that split's share. Set {BUDGET_VARIABLE} to {needed} or more."
        )
    window = 2 ** (window.bit_length() - 1)
    return Plan(decoded=decoded, resident=False, shuffle=Shuffle(counts=counts, window=window, first_window=window))
