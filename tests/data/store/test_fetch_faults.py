"""What goes wrong between a bucket and a batch: mended where that can help, else one error that names URL and bytes."""

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count, cycle
from pathlib import Path

import fsspec
import numpy as np
import pytest
from faults import Faults, faulty_proxy
from made import cached_split

from data import store
from data.cache import ShardCache
from data.errors import DataError
from data.loader import Loader
from data.manifest import check_shards, load_manifest
from data.order import shuffle_of
from data.prepare import cifar10, prepare
from data.prepare.pack import Sample
from data.prepare.remote import open_seekable
from data.store import filesystems, transfer

ROOT = Path(__file__).resolve().parents[3]
MIX = {"reset": 0.05, "error": 0.05, "short": 0.02, "stall": 0.01}
"""Shares of the requests that are spoilt."""

Spoilt = Callable[[Faults], AbstractContextManager[Faults]]


@pytest.fixture
def spoilt(s3_server, bucket: str, use_server) -> Spoilt:
    """Puts a proxy between this process and the S3 server for a while."""

    @contextmanager
    def between(faults: Faults) -> Iterator[Faults]:
        with faulty_proxy(s3_server.endpoint, faults) as url:
            use_server(url, s3_server.key, s3_server.secret)
            try:
                yield faults
            finally:
                use_server(s3_server.endpoint, s3_server.key, s3_server.secret)

    return between


@pytest.fixture(autouse=True)
def counts_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_retries", type(transfer._retries)())


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of 64 KiB, so that a small file takes many."""
    monkeypatch.setattr(transfer, "RANGE_BYTES", 64 * 2**10)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent server is given up after half a second, and everything after three."""
    monkeypatch.setattr(filesystems, "_READ_SECONDS", 0.5)
    monkeypatch.setattr(transfer, "_FETCH_DEADLINE", 3.0)
    monkeypatch.setattr(transfer, "_SLOWEST_BYTES_PER_SECOND", 1e12)


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


def digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


Put = Callable[[str, bytes | None], None]


@pytest.fixture(scope="module")
def put(s3_server) -> Put:
    """Writes an object past any proxy, or removes it."""
    options = {"key": s3_server.key, "secret": s3_server.secret, "endpoint_url": s3_server.endpoint}
    direct = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    return lambda url, payload: direct.rm_file(url) if payload is None else direct.pipe_file(url, payload)


OLD, NEW = (np.random.default_rng(seed).bytes(150_000) for seed in range(2))


def replacing(put: Put, url: str, payloads: Iterator[bytes]) -> Faults:
    """No faults, but before each second range of the file that is read, it is replaced."""
    asked = count(1)

    def before(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/x") and next(asked) % 2 == 0 and (payload := next(payloads, None)):
            put(url, payload)

    return Faults(before=before)


def test_a_file_replaced_while_it_is_read_is_read_anew(
    bucket: str, spoilt: Spoilt, put: Put, small_ranges: None, tmp_path: Path
) -> None:
    url = f"{bucket}/x"
    for sha256 in (digest(NEW), None):
        put(url, OLD)
        with spoilt(replacing(put, url, iter([NEW]))):
            store.fetch(url, len(NEW), sha256, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == NEW
        put(url, OLD)
        with spoilt(replacing(put, url, iter([NEW]))):
            assert store.read_bytes(url) == NEW
    assert store.retries() == {"file replaced while it was read": 4}


def test_a_file_that_is_replaced_all_the_time_is_an_error(
    bucket: str, spoilt: Spoilt, put: Put, small_ranges: None, tmp_path: Path
) -> None:
    put(f"{bucket}/x", OLD)
    faults = replacing(put, f"{bucket}/x", cycle([NEW, OLD]))
    with spoilt(faults), pytest.raises(DataError, match=rf"{bucket}/x was replaced while it was read: read it again"):
        store.fetch(f"{bucket}/x", len(OLD), None, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_becomes_shorter_is_seen(
    bucket: str, spoilt: Spoilt, put: Put, small_ranges: None, tmp_path: Path
) -> None:
    url = f"{bucket}/x"
    put(url, OLD)
    message = rf"{url} has 1000 bytes, but 150000 are expected: it is cut short"
    with spoilt(replacing(put, url, iter([NEW[:1000]]))), pytest.raises(DataError, match=message):
        store.fetch(url, len(OLD), digest(OLD), tmp_path / "copy")
    put(url, OLD)
    with spoilt(replacing(put, url, iter([NEW[:1000]]))):
        store.fetch(url, None, None, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == NEW[:1000]


def test_an_archive_replaced_between_two_reads_is_an_error(bucket: str, put: Put) -> None:
    put(f"{bucket}/x", OLD * 20)
    with open_seekable(f"{bucket}/x") as file:
        assert file.read(1000) == OLD[:1000]
        put(f"{bucket}/x", NEW * 20)
        file.seek(2_500_000)
        with pytest.raises(DataError, match="was replaced while it was read"):
            file.read(1000)


def test_a_local_file_replaced_while_it_is_read_is_read_anew(
    small_ranges: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, asked, read = tmp_path / "x", count(1), transfer._range
    source.write_bytes(OLD)

    def replacing_first(*arguments) -> bytes:
        if next(asked) == 2:
            (tmp_path / "new").write_bytes(NEW)
            (tmp_path / "new").rename(source)
        return read(*arguments)

    monkeypatch.setattr(transfer, "_range", replacing_first)
    store.fetch(str(source), None, None, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == NEW


def test_bytes_changed_on_the_way_are_fetched_again(
    bucket: str, spoilt: Spoilt, put: Put, small_ranges: None, tmp_path: Path
) -> None:
    put(f"{bucket}/x", OLD)
    faults, ranges_asked = Faults(), count(1)
    faults.before = lambda method, _: setattr(faults, "shares", {"flip": method == "GET" and next(ranges_asked) == 2})
    with spoilt(faults):
        store.fetch(f"{bucket}/x", len(OLD), digest(OLD), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == OLD
    assert faults.done == {"flip": 1}
    assert store.retries() == {"other bytes than the SHA-256 states": 1}


@pytest.mark.parametrize("kind", ["stall", "trickle", "short", "reset", "error"])
def test_a_server_that_never_mends_is_one_error_in_time(
    bucket: str, spoilt: Spoilt, put: Put, impatient: None, tmp_path: Path, kind: str
) -> None:
    put(f"{bucket}/x", OLD)
    faults = Faults(stall_seconds=3600.0)
    faults.before = lambda method, path: setattr(faults, "shares", {kind: float(method == "GET")})
    began = time.monotonic()
    with spoilt(faults), pytest.raises(DataError, match=rf"cannot read bytes 0 to 150000 of {bucket}/x"):
        store.fetch(f"{bucket}/x", len(OLD), None, tmp_path / "copy")
    assert time.monotonic() - began < 8
    assert list(tmp_path.iterdir()) == []


def flipped(whole: bytes) -> bytes:
    return whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda whole: None, "cannot read the {bytes} bytes of {url}: FileNotFoundError: .* Check the spelling"),
        (flipped, "{url} is damaged: its {bytes} bytes have SHA-256 .* Copy it again from a good source"),
        (
            lambda whole: whole[:20_480],
            "{url} has 20480 bytes, but {bytes} are expected: it is cut short .* Copy it again",
        ),
        (
            lambda whole: whole[:20_692],
            "{url} has 20692 bytes, but {bytes} are expected: it is cut short .* Copy it again",
        ),
    ],
    ids=["missing", "wrong SHA-256", "cut at a member boundary", "cut inside a header"],
)
def test_a_bad_shard_is_one_error_and_the_next_run_goes_on(
    bucket: str, put: Put, tmp_path: Path, random_samples, write_set, spoil: Callable[[bytes], bytes | None], said: str
) -> None:
    samples = random_samples(25)
    manifest = write_set(bucket, samples)
    shard = manifest.splits["train"].shards[1]
    url = f"{bucket}/{shard.path}"
    whole = store.read_bytes(url)
    put(url, spoil(whole))
    with pytest.raises(DataError, match=said.format(url=url, bytes=shard.bytes)):
        cached_split(bucket, manifest, "train", tmp_path)
    put(url, whole)
    cached = cached_split(bucket, manifest, "train", tmp_path)
    assert np.array_equal(cached.images, np.stack([sample.image.transpose(2, 0, 1) for sample in samples]))


FILL = """
import sys
from pathlib import Path
from data.cache import ShardCache
from data.errors import DataError
from data.manifest import load_manifest
url, cache = sys.argv[1:]
try:
    shards = list(ShardCache(url, load_manifest(url), "train", Path(cache)).shards())
    print(sum(int(images.sum()) for images, _ in shards), sum(int(labels.sum()) for _, labels in shards))
except DataError as error:
    print(f"DataError: {error}")
"""


def totals(samples: list[Sample]) -> str:
    return f"{sum(int(sample.image.sum()) for sample in samples)} {sum(sample.label for sample in samples)}"


def test_a_disk_that_fills_up_is_one_error_and_the_next_run_goes_on(tmp_path: Path, random_samples, write_set) -> None:
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    (cache := tmp_path / "cache").mkdir()
    small = f"mount -t tmpfs -o size=64k none {cache}"
    if subprocess.run([*mount, small], capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here")
    samples = random_samples(120)
    write_set(str(tmp_path / "set"), samples, samples_per_shard=40)
    # The images take 16 KiB, and each copy of a shard 90.
    fill = f"{sys.executable} -c '{FILL}' {tmp_path / 'set'} {cache}"
    grown = f"mount -o remount,size=8m {cache}"
    command = [*mount, f"{small} && {fill} && ls -A {cache} && {grown} && {fill}"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    error, *files, result = run.stdout.splitlines()
    assert re.fullmatch(
        rf"DataError: cannot use the cache folder {cache}: there is no space left\. "
        r"Free some space, or set BCM_CACHE_DIR to a folder on a local disk with room\.",
        error,
    )
    assert not [name for name in files if name.endswith((".fetched", ".tmp", ".partial"))]
    assert result == totals(samples)


def test_no_process_waits_for_one_that_failed(tmp_path: Path, random_samples, write_set) -> None:
    samples = random_samples(25)
    write_set(str(tmp_path / "set"), samples)
    gone = tmp_path / "set" / "train-000001.tar"
    whole = gone.read_bytes()
    gone.unlink()
    command = [sys.executable, "-c", FILL, str(tmp_path / "set"), str(tmp_path / "cache")]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    for rank in ranks:
        out, _ = rank.communicate(timeout=60)
        assert re.match(rf"DataError: cannot read the \d+ bytes of {gone}: FileNotFoundError", out)
    gone.write_bytes(whole)
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.stdout.strip() == totals(samples)


UNFORKED = """
import sys
forks = []
sys.addaudithook(lambda event, _: forks.append(event) if event in ("os.fork", "os.forkpty") else None)
from itertools import islice
from pathlib import Path
from data import store
from data.prepare.audit import examined
from data.cache import ShardCache
from data.loader import Loader
from data.manifest import load_manifest
from data.order import shuffle_of
url, folder = sys.argv[1:]
manifest = load_manifest(url)
list(examined(url, manifest, 0))
cache = ShardCache(url, manifest, "train", Path(folder))
shuffle = shuffle_of(manifest, "train")
loader = Loader(cache=cache, shuffle=shuffle, batch_size=100, seed=0, rank=0, world_size=1, flip=True)
store.write_bytes(f"{url}/more", b"more")
print(sum(len(batch.ids) for batch in islice(loader.batches(0), 20)), forks)
"""


@pytest.mark.slow
def test_nothing_forks_while_a_file_system_is_open(bucket: str, tmp_path: Path, random_samples, write_set) -> None:
    write_set(bucket, random_samples(200))
    command = [sys.executable, "-c", UNFORKED, bucket, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.stdout.strip() == "2000 []", run.stderr
