"""Whatever the shards, the budget, the number of workers and the stops: every epoch shows each image exactly once."""

import contextlib
import fcntl
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import budget_of, write_numbered

from data import store
from data.cache import ShardCache
from data.errors import DataError
from data.loader import Batch, Loader
from data.manifest import Manifest
from data.order import Shuffle, epoch_order, shuffle_of

SEED = 11
quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def joined(parts: list[Batch]) -> tuple[list[int], torch.Tensor, list[int], list[int]]:
    """Ids, images, labels and positions of a global batch."""
    images = torch.cat([part.images for part in parts])
    return (
        [i for part in parts for i in part.ids.tolist()],
        images,
        [label for part in parts for label in part.labels.tolist()],
        [place for part in parts for place in part.positions.tolist()],
    )


def walked(
    folder: Path,
    manifest: Manifest,
    shuffle: Shuffle,
    batch_size: int,
    stops: list[tuple[int, int]],
    budgets: Sequence[int] = (10**9,),
    url: str | None = None,
) -> Iterator[list[int]]:
    """Ids of each global batch of a run that stops and goes on: (workers, steps), one after another.

    The set is at `url`, by default in the folder, where the caches are.
    Each budget is that of a node: rank r works on node r modulo their number, with a cache folder of its own.
    """
    seen = 0
    for workers, steps in stops:
        nodes = [rank % len(budgets) for rank in range(workers)]
        ranks = [
            Loader(
                cache=ShardCache(url or str(folder), manifest, "train", folder / f"cache{node}", budgets[node]),
                shuffle=shuffle,
                batch_size=batch_size,
                seed=SEED,
                rank=rank,
                world_size=workers,
                flip=False,
                pinned=False,
            ).batches(seen)
            for rank, node in enumerate(nodes)
        ]
        for _ in range(steps):
            ids, images, labels, positions = joined([next(rank) for rank in ranks])
            assert (images[:, 0, 0, 0].int() * 256 + images[:, 1, 0, 0].int()).tolist() == ids
            assert labels == [i % 4 for i in ids]
            assert positions == list(range(seen, seen + batch_size))
            seen += batch_size
            yield ids
        for rank in ranks:
            rank.close()


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each shard is fetched inside."""
    times: Counter[str] = Counter()
    fetch = store.fetch

    def noted(url: str, *arguments, **options) -> None:
        times[url] += 1
        fetch(url, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "fetch", noted)
        yield times


@given(
    counts=st.lists(st.integers(33, 48), min_size=3, max_size=7),
    window=st.sampled_from([1, 2, 3]),
    batch=st.sampled_from([12, 24]),
    data=st.data(),
)
@settings(quick, max_examples=15)
def test_every_epoch_is_a_permutation_across_stops_changes_of_workers_and_budgets(counts, window, batch, data) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = write_numbered(folder, counts)
        shuffle = shuffle_of(manifest, "train", window)
        total = sum(counts)
        steps, stops = -(-2 * total // batch), []
        while steps > 0:
            workers = data.draw(st.sampled_from([1, 2, 3, 4]))
            stops.append((workers, data.draw(st.integers(1, steps))))
            steps = steps - stops[-1][1] if len(stops) < 4 else 0
        budgets = [budget_of(manifest, data.draw(st.integers(3, 9))) for _ in range(3)]
        ids = [i for batch_ids in walked(folder, manifest, shuffle, batch, stops, budgets) for i in batch_ids]
        orders = np.concatenate([epoch_order(SEED, epoch, shuffle) for epoch in range(3)])
        assert ids == orders[: len(ids)].tolist()
        for epoch in range(len(ids) // total):
            assert sorted(ids[epoch * total : (epoch + 1) * total]) == list(range(total))


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_batches_are_the_same_at_any_number_of_workers_and_three_budgets(
    tmp_path: Path, workers: int, place: str, request: pytest.FixtureRequest
) -> None:
    manifest, url = write_numbered(tmp_path, [40] * 12), None
    if place == "bucket":
        url = request.getfixturevalue("bucket")
        for shard in manifest.split("train").shards:
            store.write_bytes(store.join(url, shard.path), (tmp_path / shard.path).read_bytes())
            (tmp_path / shard.path).unlink()
    shuffle = shuffle_of(manifest, "train", 4)
    # The smallest cache does not hold a window, the next one just does, the last all.
    budgets = [budget_of(manifest, shards) for shards in (3, 4, 20)]
    batches = list(walked(tmp_path, manifest, shuffle, 24, [(workers, 30)], budgets, url))
    expected = np.concatenate([epoch_order(SEED, epoch, shuffle) for epoch in (0, 1)])
    assert [i for ids in batches for i in ids] == expected[: 30 * 24].tolist()


def test_a_cache_of_three_windows_reads_each_shard_once_in_an_epoch(tmp_path: Path) -> None:
    manifest = write_numbered(tmp_path, [40] * 12)
    shuffle = shuffle_of(manifest, "train", 2)
    epochs = 3
    with counted() as fetched:
        ids = list(walked(tmp_path, manifest, shuffle, 8, [(1, epochs * 60)], [budget_of(manifest, 6)]))
    assert len(ids) == epochs * 60
    # Batches made ahead reach into the next epoch's first window, and the one after it is fetched then.
    assert sum(fetched.values()) <= 12 * epochs + 4
    assert max(fetched.values()) <= epochs + 1


def test_the_cache_stays_within_its_budget(tmp_path: Path) -> None:
    manifest = write_numbered(tmp_path, [40] * 12)
    budget = budget_of(manifest, 6)
    largest = 0
    for _ in walked(tmp_path, manifest, shuffle_of(manifest, "train", 2), 8, [(1, 90)], [budget]):
        # Nothing is reserved or removed while this lock is held.
        with (tmp_path / "cache0" / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = [path for path in (tmp_path / "cache0").iterdir() if path.suffix in (".pixels", ".partial")]
            largest = max(largest, sum(path.stat().st_size for path in files if path.exists()))
    assert 0 < largest <= budget


def test_a_cache_smaller_than_a_window_is_told_and_gives_the_same_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_numbered(tmp_path, [40] * 6)
    shuffle = shuffle_of(manifest, "train")
    small, large = ([budget_of(manifest, shards)] for shards in (3, 6))
    batches = list(walked(tmp_path, manifest, shuffle, 24, [(1, 12)], small))
    said = capsys.readouterr().out
    assert said.startswith("warning: images are shuffled among 6 shards") and "Set BCM_CACHE_BUDGET higher" in said
    assert batches == list(walked(tmp_path, manifest, shuffle, 24, [(1, 12)], large))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("form", ["pixels", "tar"])
@pytest.mark.parametrize("window", [6, 2])
def test_every_form_holds_the_same_images(tmp_path: Path, form: str, window: int) -> None:
    manifest = write_numbered(tmp_path, [64] * 6, resolution=32, encoding="png" if form == "tar" else "raw")
    entries = manifest.splits["train"].shards
    sizes = {"tar": sum(s.bytes + 8 * s.count + 32 for s in entries), "pixels": 384 * 3080 + 6 * 32}
    budget = sizes[form] * window // 6 + (sizes[form] // 6 if window == 2 else 0)
    shuffle = shuffle_of(manifest, "train", window)
    ids = list(walked(tmp_path, manifest, shuffle, 8, [(2, 48)], [budget]))
    assert sorted(i for batch in ids for i in batch) == list(range(384))
    assert {path.suffix for path in (tmp_path / "cache0").iterdir()} - {""} == {f".{form}"}


def test_a_shard_is_the_same_in_both_forms(tmp_path: Path) -> None:
    manifest = write_numbered(tmp_path, [64] * 3, resolution=32, encoding="png")
    small = sum(shard.bytes + 8 * shard.count + 32 for shard in manifest.splits["train"].shards)
    tars, pixels = (ShardCache(str(tmp_path), manifest, "train", tmp_path / "c", budget) for budget in (small, 10**9))
    assert len(tars) == len(pixels) == 192
    for (images, labels), (same, as_well) in zip(tars.shards(), pixels.shards(), strict=True):
        assert np.array_equal(images, same) and np.array_equal(labels, as_well)
    assert {path.suffix for path in (tmp_path / "c").iterdir()} - {""} == {".tar", ".pixels"}


def test_batches_come_before_the_split_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_numbered(tmp_path, [40] * 12)
    monkeypatch.setattr("data.order.FIRST_WINDOW_BYTES", 3 * 40 * 12)
    shuffle = shuffle_of(manifest, "train")
    order = epoch_order(SEED, 0, shuffle)
    late, come, fetch = f"train-{order[-1] // 40:06d}.tar", threading.Event(), store.fetch

    def slow(url: str, *arguments, **options) -> None:
        assert not url.endswith(late) or come.wait(60)
        fetch(url, *arguments, **options)

    monkeypatch.setattr(store, "fetch", slow)
    cache = ShardCache(str(tmp_path), manifest, "train", tmp_path / "cache", 10**6)
    loader = Loader(cache=cache, shuffle=shuffle, batch_size=8, seed=SEED, rank=0, world_size=1, flip=False)
    batches = loader.batches(0)
    assert [i for _ in range(12) for i in next(batches).ids.tolist()] == order[:96].tolist()
    come.set()
    assert [i for _ in range(48) for i in next(batches).ids.tolist()] == order[96:].tolist()
    batches.close()


def test_a_run_that_goes_on_fetches_all_that_the_cache_can_hold(tmp_path: Path) -> None:
    manifest = write_numbered(tmp_path, [40] * 12)
    cache = ShardCache(str(tmp_path), manifest, "train", tmp_path / "cache", budget_of(manifest, 12))
    shuffle = shuffle_of(manifest, "train")
    loader = Loader(cache=cache, shuffle=shuffle, batch_size=1, seed=SEED, rank=0, world_size=1, flip=False)
    batches = loader.batches(480)
    next(batches)
    until = time.monotonic() + 20
    while len(list((tmp_path / "cache").glob("*.pixels"))) < 12:
        assert time.monotonic() < until
        time.sleep(0.01)
    batches.close()


def test_a_missing_shard_is_told_to_whom_waits_for_it(tmp_path: Path) -> None:
    manifest = write_numbered(tmp_path, [40] * 3)
    away, gone = tmp_path / "away", tmp_path / "train-000001.tar"
    gone.rename(away)
    cache = ShardCache(str(tmp_path), manifest, "train", tmp_path / "cache", 10**6)
    shuffle = shuffle_of(manifest, "train")
    loader = Loader(cache=cache, shuffle=shuffle, batch_size=40, seed=SEED, rank=0, world_size=1, flip=False)
    with pytest.raises(DataError, match=rf"cannot read .*{gone.name}"):
        list(islice(loader.batches(0), 3))
    away.rename(gone)
    assert len(list(islice(loader.batches(0), 3))) == 3


def test_the_next_run_finds_what_is_still_there(tmp_path: Path) -> None:
    manifest = write_numbered(tmp_path, [40] * 12)
    run = partial(walked, tmp_path, manifest, shuffle_of(manifest, "train"), 8, [(1, 3)], [budget_of(manifest, 12)])
    with counted() as fetched:
        for _ in range(2):  # what the first does not come to, the second fetches
            list(run())
        assert set(fetched.values()) == {1}
