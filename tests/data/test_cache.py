"""The node-local cache: right, made once, rebuilt when damaged, and never half-made."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made import cached_split

from data import store
from data.cache import ShardCache, default_cache_dir
from data.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_cache_holds_the_samples(tmp_path: Path, random_samples, write_set, channels: int) -> None:
    samples = random_samples(25, channels=channels)
    manifest = write_set(str(tmp_path / "set"), samples)
    cached = cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")
    assert cached.images.shape == (25, channels, 6, 6)
    assert cached.images.dtype == np.uint8
    expected = np.stack([sample.image.reshape(6, 6, channels).transpose(2, 0, 1) for sample in samples])
    assert np.array_equal(cached.images, expected)
    assert cached.labels.tolist() == [sample.label for sample in samples]
    held, _ = ShardCache(str(tmp_path / "set"), manifest, "train", tmp_path / "cache").content(0)
    with pytest.raises(ValueError, match="read-only"):
        held[0] = 0


def test_a_made_cache_needs_no_shards(tmp_path: Path, random_samples, write_set) -> None:
    manifest = write_set(str(tmp_path / "set"), random_samples(5))
    first = cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")
    (tmp_path / "set" / "train-000000.tar").unlink()
    again = cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")
    assert np.array_equal(first.images, again.images)


def test_sets_with_the_same_file_names_do_not_meet(tmp_path: Path, random_samples, write_set) -> None:
    for seed in (0, 1):
        samples = random_samples(5, seed=seed)
        manifest = write_set(str(tmp_path / str(seed)), samples)
        cached = cached_split(str(tmp_path / str(seed)), manifest, "train", tmp_path / "cache")
        assert np.array_equal(cached.images[3], samples[3].image.transpose(2, 0, 1))


def test_from_s3(bucket: str, tmp_path: Path, random_samples, write_set) -> None:
    samples = random_samples(25)
    manifest = write_set(f"{bucket}/set", samples)
    cached = cached_split(f"{bucket}/set", manifest, "train", tmp_path / "cache")
    assert np.array_equal(cached.images[24], samples[24].image.transpose(2, 0, 1))


def _flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are fetched from now on."""
    names: list[str] = []
    fetch = store.fetch

    def noted(url: str, *arguments, **options) -> None:
        names.append(url.rpartition("/")[2])
        fetch(url, *arguments, **options)

    monkeypatch.setattr(store, "fetch", noted)
    return names


@pytest.mark.parametrize(
    "damage",
    [
        _flip_a_byte,
        lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
    ids=["hash changed", "label changed", "short", "empty", "missing"],
)
def test_a_damaged_cache_is_mended_and_only_the_damaged_shard_is_fetched_again(
    tmp_path: Path, random_samples, write_set, fetched: list[str], damage: Callable[[Path], None]
) -> None:
    samples = random_samples(25)
    manifest = write_set(str(tmp_path / "set"), samples)
    cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")
    assert sorted(fetched) == [f"train-00000{shard}.tar" for shard in range(3)]
    damage(ShardCache(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")._paths[1])
    cached = cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")
    assert fetched[3:] == ["train-000001.tar"]
    assert np.array_equal(cached.images, np.stack([sample.image.transpose(2, 0, 1) for sample in samples]))
    assert cached.labels.tolist() == [sample.label for sample in samples]


SCRIPT = """
import sys, time
from pathlib import Path
from data import cache
from data.manifest import load_manifest
url, folder, log, pause = sys.argv[1:]
read = cache.read_labels
def noted(path, source, *arguments):
    with open(log, "a") as file:
        file.write(source.rpartition("/")[2] + "\\n")
    time.sleep(float(pause))
    return read(path, source, *arguments)
cache.read_labels = noted
shards = list(cache.ShardCache(url, load_manifest(url), "train", Path(folder)).shards())
print(sum(int(images.sum()) for images, _ in shards), sum(int(labels.sum()) for _, labels in shards))
"""


def start_process(tmp_path: Path, pause: float) -> subprocess.Popen[str]:
    arguments = [str(tmp_path / "set"), str(tmp_path / "cache"), str(tmp_path / "log"), str(pause)]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_two_processes_at_once_make_it_once(tmp_path: Path, random_samples, write_set) -> None:
    samples = random_samples(25)
    write_set(str(tmp_path / "set"), samples)
    processes = [start_process(tmp_path, pause=0.2) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    total = sum(int(sample.image.sum()) for sample in samples), sum(sample.label for sample in samples)
    assert [out.split() for out, _ in outputs] == [[str(value) for value in total]] * 2, outputs
    assert sorted((tmp_path / "log").read_text().splitlines()) == [f"train-00000{shard}.tar" for shard in range(3)]


def _wait_for(log: Path, shards: int) -> None:
    """Returns when so many shards have been begun."""
    until = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) >= shards):
        assert time.monotonic() < until
        time.sleep(0.02)


def _kill_after(process: subprocess.Popen[str], log: Path, shards: int) -> None:
    _wait_for(log, shards)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_after_a_kill_the_next_process_goes_on(tmp_path: Path, random_samples, write_set, fetched: list[str]) -> None:
    samples = random_samples(55)
    manifest = write_set(str(tmp_path / "set"), samples)
    _kill_after(start_process(tmp_path, pause=0.3), tmp_path / "log", 4)
    cached = cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")
    assert np.array_equal(cached.images, np.stack([sample.image.transpose(2, 0, 1) for sample in samples]))
    assert cached.labels.tolist() == [sample.label for sample in samples]
    assert 2 <= len(fetched) <= 4
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {"", ".pixels"}


def test_a_process_that_waits_takes_over_from_one_that_is_killed(tmp_path: Path, random_samples, write_set) -> None:
    samples = random_samples(45)
    write_set(str(tmp_path / "set"), samples)
    victim = start_process(tmp_path, pause=0.5)
    _wait_for(tmp_path / "log", 1)
    heir = start_process(tmp_path, pause=0.0)
    _kill_after(victim, tmp_path / "log", 3)
    out, err = heir.communicate(timeout=60)
    total = sum(int(sample.image.sum()) for sample in samples), sum(sample.label for sample in samples)
    assert out.split() == [str(value) for value in total], err


@pytest.mark.parametrize("room", [100_000, 150_000], ids=["for no shard", "for a shard and not for its copy"])
def test_a_full_disk_is_told(tmp_path: Path, random_samples, write_set, room: int) -> None:
    write_set(str(tmp_path / "set"), random_samples(400, resolution=30), samples_per_shard=40, resolution=30)
    limited = (
        "import resource, signal; from pathlib import Path\n"
        f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "from data.cache import ShardCache; from data.manifest import load_manifest\n"
        f"url = {str(tmp_path / 'set')!r}\n"
        f"list(ShardCache(url, load_manifest(url), 'train', Path({str(tmp_path / 'cache')!r})).shards())\n"
    )
    run = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "DataError: cannot use the cache folder" in run.stderr, run.stderr
    assert "no space left. Free some space, or set BCM_CACHE_DIR" in run.stderr


def test_a_set_larger_than_the_free_space_is_refused_at_once(
    tmp_path: Path, random_samples, write_set, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_set(str(tmp_path / "set"), random_samples(5))
    usage = shutil.disk_usage(tmp_path)._replace(free=500)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="no space left"):
        cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")
    assert fetched == []


def test_a_cache_folder_that_is_a_file(tmp_path: Path, random_samples, write_set) -> None:
    manifest = write_set(str(tmp_path / "set"), random_samples(5))
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(DataError, match="cannot use the cache folder"):
        cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BCM_CACHE_DIR", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("BCM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "bcm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "bcm"
