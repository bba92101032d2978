"""A shard that cannot come, or a disk that fills up, is one error to every thread and process; the next run goes on."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from faults import Faults, Put, Spoilt
from made import cached_split

from data import store
from data.cache import ShardCache
from data.errors import DataError, StorageError
from data.loader import Batch, Loader
from data.order import shuffle_of
from data.prepare.pack import Sample

ROOT = Path(__file__).resolve().parents[3]


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


def test_a_storage_that_never_mends_is_told_by_its_deadline(
    bucket: str, spoilt: Spoilt, impatient: None, tmp_path: Path, random_samples, write_set, monkeypatch
) -> None:
    """Whoever waits for what is fetched ahead fails with it, and what was to be fetched after it is not begun."""
    manifest = write_set(bucket, random_samples(80))
    tried, fetch = Counter[str](), store.fetch

    def noted(url: str, *arguments, **options) -> None:
        tried[url] += 1
        fetch(url, *arguments, **options)

    def batches() -> Iterator[Batch]:
        cache, shuffle = ShardCache(bucket, manifest, "train", tmp_path), shuffle_of(manifest, "train")
        return Loader(
            cache=cache, shuffle=shuffle, batch_size=80, seed=0, rank=0, world_size=1, flip=False, pinned=False
        ).batches(0)

    monkeypatch.setattr(store, "fetch", noted)
    with spoilt(Faults(shares={"error": 1.0})), pytest.raises(StorageError, match=rf"cannot read .*{bucket}/train-"):
        next(batches())
    # Those that two threads fetch ahead, at the same time; the batch waits for the first of them.
    assert tried == {f"{bucket}/train-00000{shard}.tar": 1 for shard in (0, 1)}
    assert len(next(batches()).ids) == 80


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
