"""The loader agrees with a slow reference, from any place, for any number of workers."""

import threading
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data.cache import ShardCache
from data.errors import DataError
from data.loader import Batch, Loader
from data.order import Shuffle, flips, permutation


@dataclass(frozen=True)
class Split:
    """A split in the cache, and the same images and labels as arrays."""

    cache: ShardCache
    images: np.ndarray
    labels: np.ndarray


@pytest.fixture
def cached(tmp_path: Path, random_samples, write_set) -> Split:
    samples = random_samples(37, resolution=5)
    manifest = write_set(str(tmp_path / "set"), samples, resolution=5)
    images = np.stack([sample.image.transpose(2, 0, 1) for sample in samples])
    cache = ShardCache(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")
    return Split(cache, images, np.array([sample.label for sample in samples]))


FIELDS = ("ids", "images", "labels", "positions")


def loader(cached: Split, *, rank: int = 0, world_size: int = 1, flip: bool = True, batch_size: int = 8) -> Loader:
    return Loader(
        cache=cached.cache,
        shuffle=Shuffle(counts=(37,)),
        batch_size=batch_size,
        seed=5,
        rank=rank,
        world_size=world_size,
        flip=flip,
    )


def reference(cached: Split, position: int, flip: bool) -> tuple[int, np.ndarray, int]:
    """Id, pixels and label at one place of the endless stream."""
    epoch, place = divmod(position, 37)
    image_id = int(permutation(5, epoch, 37)[place])
    image = cached.images[image_id]
    if flip and flips(5, epoch, 37)[image_id]:
        image = image[:, :, ::-1]
    return image_id, image, int(cached.labels[image_id])


def parts(batches: list[Batch]) -> Batch:
    """The parts of a global batch put together in rank order."""
    joined = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in FIELDS}
    return Batch(**joined, wait=0.0)


def assert_same(first: Batch, second: Batch) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("start", [0, 3, 37, 1000])
def test_batches_are_those_of_a_slow_reference(cached: Split, flip: bool, start: int) -> None:
    for step, batch in enumerate(islice(loader(cached, flip=flip).batches(start), 12)):
        places = range(start + step * 8, start + step * 8 + 8)
        assert batch.positions.tolist() == list(places)
        expected = [reference(cached, place, flip) for place in places]
        assert batch.ids.tolist() == [image_id for image_id, _, _ in expected]
        assert np.array_equal(batch.images.numpy(), np.stack([image for _, image, _ in expected]))
        assert batch.labels.tolist() == [label for _, _, label in expected]


def test_types_and_shapes(cached: Split) -> None:
    batch = next(iter(loader(cached, world_size=2).batches(0)))
    assert (batch.ids.dtype, batch.ids.shape) == (torch.int64, (4,))
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (4, 3, 5, 5))
    assert (batch.labels.dtype, batch.labels.shape) == (torch.int64, (4,))
    assert (batch.positions.dtype, batch.positions.tolist()) == (torch.int64, [0, 1, 2, 3])
    assert batch.wait >= 0
    batch.images.zero_()
    assert next(iter(loader(cached, world_size=2).batches(0))).images.any()


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_workers(cached: Split, world_size: int) -> None:
    ranks = [loader(cached, rank=rank, world_size=world_size).batches(16) for rank in range(world_size)]
    for batch in islice(loader(cached).batches(16), 10):
        assert_same(parts([next(rank) for rank in ranks]), batch)


def test_resuming_with_another_number_of_workers_continues_the_stream(cached: Split) -> None:
    unbroken = list(islice(loader(cached).batches(0), 20))
    first = list(islice(loader(cached).batches(0), 9))
    seen = int(first[-1].positions[-1]) + 1
    ranks = [loader(cached, rank=rank, world_size=2).batches(seen) for rank in range(2)]
    rest = [parts([next(rank) for rank in ranks]) for _ in range(11)]
    for expected, found in zip(unbroken, first + rest, strict=True):
        assert_same(expected, found)


def test_an_epoch_shows_every_image_once(cached: Split) -> None:
    ids = torch.cat([batch.ids for batch in islice(loader(cached, batch_size=37).batches(0), 3)])
    assert [sorted(epoch.tolist()) for epoch in ids.split(37)] == [list(range(37))] * 3


def test_a_batch_may_be_larger_than_the_set(cached: Split) -> None:
    batch = loader(cached, batch_size=100).batch(5)
    assert batch.ids.tolist() == [reference(cached, place, False)[0] for place in range(5, 105)]


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("bcm-loader")]


def test_closing_ends_the_thread(cached: Split) -> None:
    batches = loader(cached).batches(0)
    next(batches)
    assert loader_threads()
    batches.close()
    assert loader_threads() == []


def test_errors_of_the_thread_reach_the_consumer(cached: Split, tmp_path: Path) -> None:
    (tmp_path / "set" / "train-000002.tar").write_bytes(b"")
    with pytest.raises(DataError, match="train-000002"):
        list(islice(loader(cached).batches(0), 10))
    assert loader_threads() == []


def test_a_negative_position_is_refused(cached: Split) -> None:
    with pytest.raises(DataError, match="images_seen is -1"):
        next(loader(cached).batches(-1))


def test_unequal_shares_are_refused_before_the_first_batch(cached: Split) -> None:
    with pytest.raises(DataError, match="batch of 8 images cannot be shared equally by 3 workers"):
        loader(cached, world_size=3)
