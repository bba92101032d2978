"""The order of samples is a pure function of (seed, epoch, count), the same for any number of workers."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import budget_of, write_numbered

from data.errors import DataError
from data.manifest import Manifest, Shard, SplitManifest
from data.order import (
    Shuffle,
    batch_ids,
    epoch_order,
    flips,
    permutation,
    rank_slice,
    shuffle_of,
    window_of_shard,
    windows_from,
)

seeds = st.integers(0, 2**63 - 1)
counts = st.integers(1, 400)


@given(seeds, st.integers(0, 2**62), counts)
def test_every_epoch_holds_each_image_once(seed: int, epoch: int, count: int) -> None:
    assert sorted(permutation(seed, epoch, count)) == list(range(count))


def test_the_order_is_fixed_for_good() -> None:
    # Checkpoints written by any release depend on these numbers.
    assert permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert np.flatnonzero(flips(0, 0, 16)).tolist() == [0, 1, 2, 4, 6, 7, 8, 9, 10, 11, 13]


def test_the_order_is_that_of_the_raw_philox_words() -> None:
    words = np.random.Philox(key=np.array([7, 2 * 3], dtype=np.uint64)).random_raw(50)
    assert permutation(7, 3, 50).tolist() == sorted(range(50), key=lambda place: int(words[place]))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permutation(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@given(seeds, st.integers(0, 3000), st.integers(1, 300), counts)
@settings(max_examples=60)
def test_batches_walk_the_endless_stream_of_epochs(seed: int, seen: int, batch: int, count: int) -> None:
    epochs, ids = batch_ids(seed, seen, batch, Shuffle(counts=(count,)))
    expected = [divmod(position, count) for position in range(seen, seen + batch)]
    assert epochs.tolist() == [epoch for epoch, _ in expected]
    assert ids.tolist() == [permutation(seed, epoch, count)[place] for epoch, place in expected]


@given(seeds, st.integers(0, 500), st.integers(1, 10), st.integers(0, 200))
@settings(max_examples=60)
def test_every_number_of_workers_shares_the_same_global_batch(seed: int, seen: int, share: int, count: int) -> None:
    size = 4 * share
    _, whole = batch_ids(seed, seen, size, Shuffle(counts=(count + 1,)))
    for workers in (1, 2, 4):
        parts = [whole[rank_slice(size, rank, workers)] for rank in range(workers)]
        assert {len(part) for part in parts} == {size // workers}
        assert np.concatenate(parts).tolist() == whole.tolist()


def test_about_half_of_the_images_are_flipped_and_each_epoch_draws_anew() -> None:
    coins = np.stack([flips(3, epoch, 4000) for epoch in range(2)])
    assert 1900 < coins[0].sum() < 2100
    assert 1900 < (coins[0] != coins[1]).sum() < 2100


def test_a_flip_does_not_depend_on_the_number_of_images() -> None:
    assert flips(3, 1, 100).tolist() == flips(3, 1, 4000)[:100].tolist()


def test_flips_are_independent_of_the_order() -> None:
    order, coins = permutation(5, 0, 4000), flips(5, 0, 4000)
    assert abs(np.corrcoef(order[:-1], coins[:-1])[0, 1]) < 0.06


def test_unequal_shares_name_both_numbers_and_sizes_that_work() -> None:
    with pytest.raises(DataError, match=r"batch of 10 images .* 4 workers.* 8 or 12"):
        rank_slice(10, 0, 4)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(DataError, match="rank"):
        rank_slice(4, rank, 2)


@pytest.mark.parametrize(
    ("seed", "seen", "batch", "count", "said"),
    [
        (-1, 0, 1, 5, "seed -1 is out of range"),
        (2**63, 0, 1, 5, "seed 9223372036854775808 is out of range"),
        (0, -1, 1, 5, "images_seen is -1"),
        (0, 0, 0, 5, "cannot draw a batch of 0 images"),
        (0, 0, 1, 0, "each needs at least one"),
    ],
)
def test_numbers_out_of_range_are_refused(seed: int, seen: int, batch: int, count: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        batch_ids(seed, seen, batch, Shuffle(counts=(count,)))


layouts = st.lists(st.integers(1, 20), min_size=1, max_size=12).map(tuple)


@given(seeds, st.integers(0, 3), layouts, st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=60)
def test_an_epoch_goes_through_its_windows_one_by_one(
    seed: int, epoch: int, counts: tuple[int, ...], window: int, first: int
) -> None:
    shuffle = Shuffle(counts=counts, window=window, first_window=first)
    size = window if epoch else first
    windows = window_of_shard(seed, epoch, shuffle)
    assert sorted(set(windows.tolist())) == list(range(-(-len(counts) // size)))
    shards_of_windows = np.bincount(windows)
    assert shards_of_windows.max() <= size
    assert shards_of_windows.max() - shards_of_windows.min() <= 1
    order = epoch_order(seed, epoch, shuffle)
    assert sorted(order.tolist()) == list(range(sum(counts)))
    images_of_windows = np.bincount(windows, weights=counts)
    walked = np.repeat(windows, counts)[order]
    assert walked.tolist() == np.repeat(np.arange(len(images_of_windows)), images_of_windows.astype(int)).tolist()


@given(seeds, st.integers(0, 2**20), layouts, st.integers(1, 6))
@settings(max_examples=60)
def test_the_shards_that_come_next_are_those_of_the_images_that_come_next(
    seed: int, seen: int, counts: tuple[int, ...], window: int
) -> None:
    shuffle = Shuffle(counts=counts, window=window, first_window=1)
    starts = np.concatenate([[0], np.cumsum(counts)])
    _, ids = batch_ids(seed, seen, 2 * sum(counts), shuffle)
    needed = list(dict.fromkeys((np.searchsorted(starts, ids, side="right") - 1).tolist()))
    coming: list[int] = []
    for shards in islice(windows_from(seed, seen, shuffle), 2 * len(counts)):
        coming += [shard for shard in shards.tolist() if shard not in coming]
    first = next(windows_from(seed, seen, shuffle)).tolist()
    assert needed[0] in first and set(needed) <= set(coming)


@given(seeds, st.integers(0, 3), layouts)
def test_one_window_is_the_permutation_of_all_images(seed: int, epoch: int, counts: tuple[int, ...]) -> None:
    shuffle = Shuffle(counts=counts, window=len(counts), first_window=len(counts))
    assert epoch_order(seed, epoch, shuffle).tolist() == permutation(seed, epoch, sum(counts)).tolist()
    assert (
        epoch_order(seed, epoch, Shuffle(counts=(sum(counts),))).tolist()
        == permutation(seed, epoch, sum(counts)).tolist()
    )


def test_the_windows_are_fixed_for_good() -> None:
    # As above: checkpoints depend on these numbers.
    shuffle = Shuffle(counts=(3, 4, 5, 2), window=2, first_window=1)
    assert window_of_shard(0, 0, shuffle).tolist() == [1, 2, 0, 3]
    assert window_of_shard(0, 1, shuffle).tolist() == [0, 1, 0, 1]
    assert epoch_order(0, 1, shuffle).tolist() == [10, 7, 2, 9, 1, 11, 0, 8, 6, 13, 3, 5, 4, 12]


def test_the_default_windows_are_fixed_for_good() -> None:
    def split(name: str, counts: list[int]) -> SplitManifest:
        facts = {"bytes": 2**40, "sha256": "0" * 64, "places": "1024+1024*5"}
        shards = tuple(Shard(path=f"{name}-{number}.tar", count=n, **facts) for number, n in enumerate(counts))
        return SplitManifest(count=sum(counts), shards=shards)

    def default(resolution: int, **counts: list[int]) -> tuple[int, int]:
        """Window and first window of "train" in a set whose shards hold so many images."""
        splits = {name: split(name, of_split) for name, of_split in counts.items()}
        facts = {"name": "made", "channels": 3, "class_names": ("a",), "flip": True}
        shuffle = shuffle_of(Manifest(**facts, resolution=resolution, splits=splits), "train")
        return shuffle.window, shuffle.first_window

    # As above. A node's default cache holds each of the first three sets, and three windows of the last one.
    assert default(32, train=[1000] * 50, test=[1000] * 10) == (50, 21)
    assert default(64, train=[1000] * 1281 + [167], test=[1000] * 50) == (1282, 5)
    assert default(128, train=[1000] * 1281 + [167], test=[1000] * 50) == (1282, 1)
    assert default(256, train=[1000] * 1281 + [167], test=[1000] * 50) == (64, 1)


def test_the_window_follows_from_the_manifest_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_numbered(tmp_path, [40] * 12)
    for budget in ("3000", "64G"):
        monkeypatch.setenv("BCM_CACHE_BUDGET", budget)
        assert shuffle_of(manifest, "train").window == 12
    monkeypatch.setattr("data.order.SET_BYTES", budget_of(manifest, 12) + 12)
    assert shuffle_of(manifest, "train").window == 12
    monkeypatch.setattr("data.order.SET_BYTES", budget_of(manifest, 11))
    assert shuffle_of(manifest, "train").window == 2
    assert shuffle_of(manifest, "train", 7).window == 7
    with pytest.raises(DataError, match="window is 13: give a number of shards up to the 12 of 'train'"):
        shuffle_of(manifest, "train", 13)


def test_each_epoch_deals_the_shards_to_windows_anew() -> None:
    shuffle = Shuffle(counts=(1,) * 40, window=10, first_window=10)
    assert len({tuple(window_of_shard(seed, epoch, shuffle)) for seed in range(3) for epoch in range(5)}) == 15


@pytest.mark.parametrize(
    ("counts", "window", "first", "said"),
    [
        ((), 1, 1, "each needs at least one"),
        ((3, 0), 1, 1, "each needs at least one"),
        ((3,), 0, 1, "windows of 0 and 1 shards"),
        ((3,), 1, 0, "windows of 1 and 0 shards"),
    ],
)
def test_shuffles_that_cannot_be_are_refused(counts: tuple[int, ...], window: int, first: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Shuffle(counts=counts, window=window, first_window=first)
