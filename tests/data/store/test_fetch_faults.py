"""What goes wrong between a bucket and a batch: mended where that can help, else one error that names URL and bytes."""

import hashlib
import os
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from faults import Faults, Put, Spoilt

from data import store
from data.cache import ShardCache
from data.errors import DataError
from data.loader import Loader
from data.manifest import check_shards, load_manifest
from data.order import shuffle_of
from data.prepare import cifar10, prepare
from data.prepare.pack import Sample
from data.store import filesystems, transfer

MIX = {"reset": 0.05, "error": 0.05, "short": 0.02, "stall": 0.01}
"""Shares of the requests that are spoilt."""
PAYLOAD = np.random.default_rng(0).bytes(150_000)


def read_an_epoch(url: str, split: str, cache: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Reads a whole epoch as two workers do, and compares every image with its source."""
    manifest = load_manifest(url)
    check_shards(url, manifest)
    loaders = [
        Loader(
            cache=ShardCache(url, manifest, split, cache),
            shuffle=shuffle_of(manifest, split),
            batch_size=500,
            seed=3,
            rank=rank,
            world_size=2,
            flip=False,
            pinned=False,
        )
        for rank in range(2)
    ]
    ranks = [loader.batches(0) for loader in loaders]
    seen: list[int] = []
    for _ in range(len(labels) // 500):
        for batch in [next(rank) for rank in ranks]:
            ids = batch.ids.numpy()
            assert np.array_equal(batch.images.numpy(), images[ids])
            assert np.array_equal(batch.labels.numpy(), labels[ids])
            seen += ids.tolist()
    for rank in ranks:
        rank.close()
    assert sorted(seen) == list(range(len(labels)))


CAUSES = {"status 500", "status 503", "connection broken off", "short answer", "no answer in time"}


@pytest.mark.slow
def test_an_epoch_through_faults_is_the_same(
    bucket: str, spoilt: Spoilt, small_ranges: None, tmp_path: Path, random_samples, write_set, monkeypatch
) -> None:
    # A stall would outlast the test by far, if it were waited for.
    monkeypatch.setattr(filesystems, "_READ_SECONDS", 1.0)
    samples: list[Sample] = random_samples(4000, resolution=32)
    images = np.stack([sample.image.transpose(2, 0, 1) for sample in samples])
    labels = np.array([sample.label for sample in samples])
    with spoilt(Faults(shares=MIX, stall_seconds=3600.0)) as faults:
        write_set(bucket, samples, samples_per_shard=500, resolution=32)
        read_an_epoch(bucket, "train", tmp_path, images, labels)
    assert set(faults.done) == set(MIX)
    assert set(store.retries()) == CAUSES
    assert sum(store.retries().values()) >= 0.7 * sum(faults.done.values())


@pytest.mark.slow
@pytest.mark.skipif("BCM_FAULTS_CIFAR10" not in os.environ, reason="takes minutes: set BCM_FAULTS_CIFAR10=1")
def test_an_epoch_of_cifar10_through_faults_is_the_same(
    bucket: str, spoilt: Spoilt, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "RANGE_BYTES", 256 * 2**10)
    with cifar10.unpacked(str(shared / "datasets" / "cifar-10-python.tar.xz")) as folder:
        prepare("cifar10", str(folder), bucket)
        for split in ("train", "test"):
            stretches = cifar10.stretches(folder)[split]
            entries = [entry for each in stretches for entry in each.read(each.images, 0, each.count)]
            samples = [entry for entry in entries if isinstance(entry, Sample)]
            images = np.stack([sample.image.transpose(2, 0, 1) for sample in samples])
            labels = np.array([sample.label for sample in samples])
            with spoilt(Faults(shares=MIX, stall_seconds=60.0)) as faults:
                began = time.monotonic()
                read_an_epoch(bucket, split, tmp_path, images, labels)
            print(f"{split}: {len(samples)} images in {time.monotonic() - began:.0f} s;", faults.requests, faults.done)
    print(store.retries())
    assert set(store.retries()) == CAUSES


def test_bytes_changed_on_the_way_are_fetched_again(
    bucket: str, spoilt: Spoilt, put: Put, small_ranges: None, tmp_path: Path
) -> None:
    put(f"{bucket}/x", PAYLOAD)
    faults, ranges_asked = Faults(), count(1)
    faults.before = lambda method, _: setattr(faults, "shares", {"flip": method == "GET" and next(ranges_asked) == 2})
    with spoilt(faults):
        store.fetch(f"{bucket}/x", len(PAYLOAD), hashlib.sha256(PAYLOAD).hexdigest(), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == PAYLOAD
    assert faults.done == {"flip": 1}
    assert store.retries() == {"other bytes than the SHA-256 states": 1}


@pytest.mark.parametrize("kind", ["stall", "trickle", "short", "reset", "error"])
def test_a_server_that_never_mends_is_one_error_in_time(
    bucket: str, spoilt: Spoilt, put: Put, impatient: None, tmp_path: Path, kind: str
) -> None:
    put(f"{bucket}/x", PAYLOAD)
    faults = Faults(stall_seconds=3600.0)
    faults.before = lambda method, path: setattr(faults, "shares", {kind: float(method == "GET")})
    began = time.monotonic()
    with spoilt(faults), pytest.raises(DataError, match=rf"cannot read bytes 0 to 150000 of {bucket}/x"):
        store.fetch(f"{bucket}/x", len(PAYLOAD), None, tmp_path / "copy")
    assert time.monotonic() - began < 8
    assert list(tmp_path.iterdir()) == []
