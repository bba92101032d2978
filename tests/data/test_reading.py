"""Whatever the shards, the budget, the number of workers and the stops: every epoch shows each image exactly once."""

import contextlib
import fcntl
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import store
from data.cache import Split, cached_split, open_split
from data.errors import DataError
from data.extent import COUNTED
from data.folder import locked
from data.loader import Batch, Loader
from data.manifest import Manifest, SplitManifest
from data.order import epoch_order
from data.plan import plan
from data.prepare.pack import Sample, pack

SEED = 11
quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def write(folder: Path, counts: list[int], resolution: int = 2, encoding: str = "raw") -> Manifest:
    """A set with so many images in each shard, in each of which the id can be read from the pixels."""
    shards, first = [], 0
    for number, count in enumerate(counts):
        images = np.empty((count, resolution, resolution, 3), np.uint8)
        ids = np.arange(first, first + count)
        images[:] = np.stack([ids // 256, ids % 256, np.full(count, 7)], 1)[:, None, None]
        packed = pack(
            [Sample(key=f"s{i}", image=image, label=i % 4) for i, image in zip(ids.tolist(), images, strict=True)],
            encoding,
        )
        (folder / f"train-{number:06d}.tar").write_bytes(packed.payload)
        shards.append(packed.shard(f"train-{number:06d}.tar"))
        first += count
    return Manifest(
        name="made",
        resolution=resolution,
        channels=3,
        class_names=("a", "b", "c", "d"),
        flip=False,
        splits={"train": SplitManifest(count=first, shards=tuple(shards))},
    )


def budget_of(manifest: Manifest, shards: int) -> int:
    """A budget that allows windows of so many of the largest shards, decoded."""
    largest = max(shard.count for shard in manifest.split("train").shards)
    return 3 * shards * (largest * (8 + 3 * manifest.resolution**2) + 33)


def joined(parts: list[Batch]) -> tuple[list[int], torch.Tensor, list[int], list[int]]:
    """Ids, images, labels and positions of a global batch."""
    images = torch.cat([part.images for part in parts])
    return (
        [i for part in parts for i in part.ids.tolist()],
        images,
        [label for part in parts for label in part.labels.tolist()],
        [place for part in parts for place in part.positions.tolist()],
    )


def walked(split: Callable[[], Split], batch_size: int, stops: list[tuple[int, int]]) -> Iterator[list[int]]:
    """Ids of each global batch of a run that stops and goes on: (workers, steps), one after another."""
    seen = 0
    for workers, steps in stops:
        ranks = [
            Loader(
                cached=split(),
                batch_size=batch_size,
                seed=SEED,
                rank=rank,
                world_size=workers,
                flip=False,
                pinned=False,
            ).batches(seen)
            for rank in range(workers)
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
    counts=st.lists(st.integers(33, 48), min_size=1, max_size=7),
    window=st.sampled_from([1, 2, 4]),
    batch=st.sampled_from([2, 4]),
    data=st.data(),
)
@settings(quick, max_examples=15)
def test_every_epoch_is_a_permutation_across_stops_and_changes_of_workers(counts, window, batch, data) -> None:
    with tempfile.TemporaryDirectory() as name, counted() as fetched:
        folder = Path(name)
        manifest = write(folder, counts)
        budget = budget_of(manifest, window)
        shuffle = plan(manifest, "train", budget).shuffle
        total = sum(counts)
        steps, stops = -(-2 * total // batch), []
        while steps > 0:
            workers = data.draw(st.sampled_from([n for n in (1, 2, 4) if batch % n == 0]))
            stops.append((workers, data.draw(st.integers(1, steps))))
            steps = steps - stops[-1][1] if len(stops) < 4 else 0
        split = partial(open_split, name, manifest, "train", folder / "cache", budget)
        batches = list(walked(split, batch, stops))
        ids = [i for batch_ids in batches for i in batch_ids]
        orders = np.concatenate([epoch_order(SEED, epoch, shuffle) for epoch in range(3)])
        assert ids == orders[: len(ids)].tolist()
        for epoch in range(len(ids) // total):
            assert sorted(ids[epoch * total : (epoch + 1) * total]) == list(range(total))
        # At most once in each pass over its window, those that a stop cuts in two and those fetched ahead included.
        assert max(fetched.values()) <= 3 + len(stops)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_moving_window_reads_each_shard_once_in_an_epoch(tmp_path: Path, workers: int) -> None:
    manifest = write(tmp_path, [40] * 12)
    budget = budget_of(manifest, 2)
    assert not plan(manifest, "train", budget).resident
    epochs = 3
    with counted() as fetched:
        split = partial(open_split, str(tmp_path), manifest, "train", tmp_path / "cache", budget)
        ids = list(walked(split, 8, [(workers, epochs * 60)]))
    assert len(ids) == epochs * 60
    # Batches made ahead reach into the next epoch's first window, and the one after it is fetched then.
    assert sum(fetched.values()) <= 12 * epochs + 4
    assert max(fetched.values()) <= epochs + 1


def test_a_moving_window_stays_within_the_budget(tmp_path: Path) -> None:
    manifest = write(tmp_path, [40] * 12)
    budget = budget_of(manifest, 2)
    largest = 0
    split = partial(open_split, str(tmp_path), manifest, "train", tmp_path / "cache", budget)
    for _ in walked(split, 8, [(1, 90)]):
        # Nothing is made or removed while this lock is held.
        with locked(tmp_path / "cache" / "lock", fcntl.LOCK_EX):
            sizes = [file.stat().st_size for name in COUNTED for file in (tmp_path / "cache").rglob(name)]
        largest = max(largest, sum(sizes))
    assert 0 < largest <= budget


@pytest.mark.parametrize("form", ["decoded", "encoded", "window of decoded", "window of encoded"])
def test_every_form_holds_the_same_images(tmp_path: Path, form: str) -> None:
    encoding = "png" if "encoded" in form else "raw"
    manifest = write(tmp_path, [64] * 6, resolution=32, encoding=encoding)
    sizes = {
        "png": sum(s.bytes + 8 * s.count + 33 for s in manifest.splits["train"].shards),
        "raw": 384 * 3080 + 6 * 33,
    }
    budget = sizes[encoding] if "window" not in form else sizes[encoding] // 2
    found = plan(manifest, "train", budget)
    assert (found.decoded, found.resident) == (encoding == "raw", "window" not in form)
    split = partial(open_split, str(tmp_path), manifest, "train", tmp_path / "cache", budget)
    ids = list(walked(split, 8, [(2, 48)]))
    assert sorted(i for batch in ids for i in batch) == list(range(384))


def test_encoded_images_are_indexed_like_an_array(tmp_path: Path) -> None:
    manifest = write(tmp_path, [64] * 3, resolution=32, encoding="png")
    encoded_bytes = sum(shard.bytes + 8 * shard.count + 33 for shard in manifest.splits["train"].shards)
    cached = cached_split(str(tmp_path), manifest, "train", tmp_path / "cache", encoded_bytes)
    decoded = cached_split(str(tmp_path), manifest, "train", tmp_path / "cache", 10**9)
    assert cached.images.shape == decoded.images.shape == (192, 3, 32, 32)
    assert len(cached.images) == 192
    for rows in (5, slice(3, 100), slice(None, 7), np.array([4, 190, 4]), slice(9, 9)):
        assert np.array_equal(cached.images[rows], decoded.images[rows])
    assert np.array_equal(cached.labels, decoded.labels)


def test_batches_come_before_the_split_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write(tmp_path, [40] * 12)
    monkeypatch.setattr("data.plan.FIRST_WINDOW_BYTES", 3 * 40 * 20)
    order = epoch_order(SEED, 0, plan(manifest, "train", 10**6).shuffle)
    late, come, fetch = f"train-{order[-1] // 40:06d}.tar", threading.Event(), store.fetch

    def slow(url: str, *arguments, **options) -> None:
        assert not url.endswith(late) or come.wait(60)
        fetch(url, *arguments, **options)

    monkeypatch.setattr(store, "fetch", slow)
    split = open_split(str(tmp_path), manifest, "train", tmp_path / "cache", 10**6)
    loader = Loader(cached=split, batch_size=8, seed=SEED, rank=0, world_size=1, flip=False)
    assert [i for seen in range(0, 120, 8) for i in loader.batch(seen).ids.tolist()] == order[:120].tolist()
    come.set()
    assert [i for seen in range(120, 480, 8) for i in loader.batch(seen).ids.tolist()] == order[120:].tolist()


def test_a_missing_shard_is_told_to_whom_waits_for_it(tmp_path: Path) -> None:
    manifest = write(tmp_path, [40] * 3)
    away, gone = tmp_path / "away", tmp_path / "train-000001.tar"
    gone.rename(away)
    split = open_split(str(tmp_path), manifest, "train", tmp_path / "cache", 10**6)
    batches = Loader(cached=split, batch_size=40, seed=SEED, rank=0, world_size=1, flip=False).batches(0)
    with pytest.raises(DataError, match=rf"cannot read .*{gone.name}"):
        list(islice(batches, 3))
    with pytest.raises(DataError, match=rf"cannot read .*{gone.name}"):
        split.wait()
    away.rename(gone)
    open_split(str(tmp_path), manifest, "train", tmp_path / "cache", 10**6).wait()


def test_a_batch_too_large_for_its_windows_is_refused(tmp_path: Path) -> None:
    manifest = write(tmp_path, [40] * 12)
    split = open_split(str(tmp_path), manifest, "train", tmp_path / "cache", budget_of(manifest, 2))
    with pytest.raises(DataError, match="allow batches of at most 10: set BCM_CACHE_BUDGET higher"):
        Loader(cached=split, batch_size=16, seed=0, rank=0, world_size=1, flip=False)


def test_a_whole_split_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    manifest = write(tmp_path, [40] * 12)
    with pytest.raises(DataError, match=r"does not fit into a cache of .* set BCM_CACHE_BUDGET higher"):
        cached_split(str(tmp_path), manifest, "train", tmp_path / "cache", budget_of(manifest, 2))


def test_the_next_run_finds_the_windows_that_are_still_there(tmp_path: Path) -> None:
    manifest = write(tmp_path, [40] * 12)
    budget = budget_of(manifest, 2)
    split = partial(open_split, str(tmp_path), manifest, "train", tmp_path / "cache", budget)
    with counted() as fetched:
        list(walked(split, 8, [(1, 3)]))
        before = sum(fetched.values())
        list(islice(walked(split, 8, [(1, 3)]), 3))
        assert sum(fetched.values()) <= max(before, 4)
