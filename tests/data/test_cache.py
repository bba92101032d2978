"""The node-local cache: right, made once, rebuilt when damaged, and never half-made."""

import dataclasses
import hashlib
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made import cached_split
from PIL import Image

from data import store
from data.cache import ShardCache, default_cache_dir
from data.errors import DataError
from data.manifest import Manifest, Shard, SplitManifest, write_manifest

ROOT = Path(__file__).resolve().parents[2]


def png(shape: tuple[int, ...] = (6, 6, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full(shape, 7, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def set_of(folder: Path, raw: bytes, offsets: list[int], sizes: list[int]) -> Manifest:
    """A set of one shard with these bytes and a manifest whose length and hash agree with them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train-000000.tar").write_bytes(raw)
    shard = Shard(
        path="train-000000.tar",
        bytes=len(raw),
        sha256=hashlib.sha256(raw).hexdigest(),
        count=len(offsets),
        places=Shard.of("x", len(raw), "0" * 64, offsets, sizes).places,
    )
    manifest = Manifest(
        name="made",
        resolution=6,
        channels=3,
        class_names=("a", "b"),
        flip=False,
        splits={"train": SplitManifest(count=len(offsets), shards=(shard,))},
    )
    write_manifest(str(folder), manifest)
    return manifest


def set_of_members(folder: Path, members: list[tuple[str, bytes]]) -> Manifest:
    raw = tar_of(members)
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        images = [member for member in tar if member.name.endswith((".png", ".jpg"))]
    return set_of(folder, raw, [member.offset_data for member in images], [member.size for member in images])


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
    held, _ = ShardCache(str(tmp_path / "set"), manifest, "train", tmp_path / "cache").shard(0)
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


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


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


PAIR = [("a.png", png()), ("a.cls", b"0"), ("b.png", png()), ("b.cls", b"1")]


def test_a_stock_set_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 6, 3), 90, np.uint8)).save(buffer, format="JPEG")
    members = [("x/a.jpg", buffer.getvalue()), ("x/a.cls", b"1\n"), ("x/a.json", b"{}")]
    cached = cached_split(str(tmp_path), set_of_members(tmp_path, members), "train", tmp_path / "cache")
    assert cached.labels.tolist() == [1]
    assert abs(int(cached.images[0][0, 0, 0]) - 90) <= 1


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", png((7, 6, 3))), ("a.cls", b"0")], r"sample a: the image is 7x6 with 3 .* states 6x6 with 3"),
        ([("a.png", png((6, 6))), ("a.cls", b"0")], "6x6 with 1 channels"),
        ([("a.png", png((6, 6, 4))), ("a.cls", b"0")], "6x6 with RGBA channels"),
        ([("a.png", b"GIF89a" + bytes(50)), ("a.cls", b"0")], "not a readable PNG, JPEG or WebP"),
        ([("a.png", png()[:-30]), ("a.cls", b"0")], "not a readable PNG, JPEG or WebP"),
        ([("a.png", png()), ("a.cls", b"2")], "label '2' is not a whole number from 0 to 1"),
        ([("a.png", png()), ("a.cls", b"-1")], "label '-1'"),
        ([("a.png", png()), ("a.cls", b"")], "label ''"),
        ([("a.png", png()), ("a.cls", b"9" * 10_000)], "is not a whole number"),
        ([("a.png", png()), ("a.cls", "²".encode())], "is not a whole number"),
        ([("a.png", png())], "sample a lacks its image or its label"),
        ([("a.png", png()), ("b.cls", b"0")], "lacks its image or its label"),
        ([*PAIR, *PAIR], "the manifest knows no image"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    manifest = set_of_members(tmp_path / "set", members)
    with pytest.raises(DataError, match=message) as caught:
        cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")
    assert "train-000000.tar" in str(caught.value)


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pt", "pth", "npy", "npz", "image.pyd", "PKL"])
def test_members_that_could_run_code_are_refused(tmp_path: Path, extension: str) -> None:
    bomb = pickle.dumps(_Bomb(tmp_path / "exploded"))
    manifest = set_of_members(tmp_path / "set", [("a.png", png()), ("a.cls", b"0"), (f"a.{extension}", bomb)])
    with pytest.raises(DataError, match=rf"member 'a\.{extension}' is refused"):
        cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")
    assert not (tmp_path / "exploded").exists()


def test_links_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO(tar_of(PAIR))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        images = [member for member in tar if member.name.endswith(".png")]
    manifest = set_of(tmp_path, buffer.getvalue(), [m.offset_data for m in images], [m.size for m in images])
    with pytest.raises(DataError, match="link or a device"):
        cached_split(str(tmp_path), manifest, "train", tmp_path / "cache")


# Stock tar readers take a cut at a member boundary or inside a header for the end of the file, and say nothing.
@pytest.mark.parametrize("place", ["at a member boundary", "inside a header", "inside an image"])
def test_a_truncated_shard_is_an_error(tmp_path: Path, place: str) -> None:
    manifest = set_of_members(tmp_path / "set", PAIR)
    (shard,) = manifest.splits["train"].shards
    second = int(shard.spans[1, 0])
    cut = {"at a member boundary": second - 512, "inside a header": second - 212, "inside an image": second + 20}[place]
    os.truncate(tmp_path / "set" / shard.path, cut)
    with pytest.raises(DataError, match=rf"train-000000\.tar has {cut} bytes, but {shard.bytes} are expected"):
        cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")


def test_a_tar_that_ends_early_is_an_error_even_if_its_length_and_hash_agree(tmp_path: Path) -> None:
    raw = tar_of(PAIR)
    (shard,) = set_of_members(tmp_path / "set", PAIR).splits["train"].shards
    second = int(shard.spans[1, 0])
    manifest = set_of(tmp_path / "set", raw[: second - 512] + bytes(len(raw) - second + 512), *shard.spans.T.tolist())
    with pytest.raises(DataError, match="holds 1 images, but the manifest states 2"):
        cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")


def test_a_manifest_of_other_shards(tmp_path: Path, random_samples, write_set) -> None:
    manifest = write_set(str(tmp_path / "set"), random_samples(5))
    shard = dataclasses.replace(manifest.splits["train"].shards[0], sha256="0" * 64)
    other = dataclasses.replace(manifest, splits={"train": SplitManifest(count=5, shards=(shard,))})
    with pytest.raises(DataError, match=r"train-000000\.tar is damaged"):
        cached_split(str(tmp_path / "set"), other, "train", tmp_path / "cache")


def test_a_missing_shard(tmp_path: Path, random_samples, write_set) -> None:
    manifest = write_set(str(tmp_path / "set"), random_samples(25))
    (tmp_path / "set" / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read .*train-000001\.tar"):
        cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")


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
