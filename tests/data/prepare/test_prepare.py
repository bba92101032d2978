"""From an official source to a set in storage, once."""

import io
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from made import cached_split
from PIL import Image

from data import store
from data.errors import DataError
from data.manifest import check_shards, load_manifest
from data.prepare import Choices, digits, prepare, prepared

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "digits") if request.param == "local" else request.getfixturevalue("bucket") + "/digits"


def test_digits_end_to_end(place: str, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    manifest = prepare("digits", None, place, progress=lambda *news: told.append(news))
    assert told == [("train", 1000, 1500), ("train", 1500, 1500), ("test", 297, 297)]
    assert load_manifest(place) == manifest
    check_shards(place, manifest)
    assert store.list_names(place) == [
        "manifest.json",
        "test-000000.tar",
        "train-000000.tar",
        "train-000001.tar",
    ]
    for split in ("train", "test"):
        cached = cached_split(place, manifest, split, tmp_path / "cache")
        samples = list(digits.samples(split))
        assert np.array_equal(cached.images[:, 0], np.stack([sample.image for sample in samples]))
        assert cached.labels.tolist() == [sample.label for sample in samples]


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    url = str(tmp_path)
    assert prepared("digits", url) is None
    first = prepare("digits", None, url)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    told: list[tuple[str, int, int]] = []
    assert prepare("digits", None, url, progress=lambda *news: told.append(news)) == first
    assert prepared("digits", url) == first
    assert told == []
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


PREPARE = """
import sys
from data.prepare import Choices, prepare
prepare("mine", sys.argv[1], sys.argv[2], choices=Choices(resolution=16, samples_per_shard=3))
"""


@pytest.mark.slow
def test_a_run_killed_anywhere_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(120):
        store.write_bytes(f"{tmp_path}/in/{number % 4}/{number}.png", png(rng.integers(0, 256, (40, 50, 3), np.uint8)))
    choices = Choices(resolution=16, samples_per_shard=3)
    manifest = prepare("mine", str(tmp_path / "in"), str(tmp_path / "unbroken"), choices=choices)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "in"), str(killed)]
    chance = random.Random(1)
    for kill in range(5):
        before = len(shards(killed))
        with subprocess.Popen(command, cwd=ROOT) as process:
            # A random moment after its first new shard, so that each run gets on.
            while process.poll() is None and len(shards(killed)) <= before:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.03))
            assert process.poll() is None, "it ended before it was killed"
            process.kill()
        if kill == 3:
            spoil(killed, chance)
    kept = {path: path.stat().st_mtime_ns for path in shards(killed)}
    subprocess.run(command, cwd=ROOT, check=True)
    assert sum(path.stat().st_mtime_ns == time for path, time in kept.items()) >= len(kept) - 3
    assert content(killed) == content(tmp_path / "unbroken")
    assert load_manifest(str(killed)) == manifest


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def spoil(folder: Path, chance: random.Random) -> None:
    """What a loss of power may leave: a shard without its note, a note without its shard, half a note."""
    for path, problem in zip(chance.sample(shards(folder), 3), ("note", "shard", "half"), strict=True):
        note = folder / f".{path.name}.json"
        if problem == "shard":
            path.unlink()
        elif note.exists():
            note.unlink() if problem == "note" else note.write_bytes(note.read_bytes()[:50])


def test_another_encoding_or_source_writes_what_it_concerns_anew(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        store.write_bytes(f"{tmp_path}/in/{number:02d}.png", png(image))
    store.write_bytes(f"{tmp_path}/in/29.png", b"none")
    raw, webp = (Choices(resolution=16, samples_per_shard=5, encoding=encoding) for encoding in ("raw", "webp"))
    for choices in (raw, webp):
        with pytest.raises(DataError, match=r"29\.png"):
            prepare("mine", str(tmp_path / "in"), str(tmp_path / "set"), choices=choices)
    store.write_bytes(f"{tmp_path}/in/29.png", png(images[29]))
    manifest = prepare("mine", str(tmp_path / "in"), str(tmp_path / "set"), choices=webp)
    assert prepare("mine", str(tmp_path / "in"), str(tmp_path / "fresh"), choices=webp) == manifest
    cached = cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")
    assert np.array_equal(np.asarray(cached.images), images[:27].transpose(0, 3, 1, 2))


def test_an_incomplete_set_is_written_anew(tmp_path: Path) -> None:
    first = prepare("digits", None, str(tmp_path))
    (tmp_path / "train-000001.tar").unlink()
    assert prepared("digits", str(tmp_path)) is None
    assert prepare("digits", None, str(tmp_path)) == first
    check_shards(str(tmp_path), first)


def test_another_set_is_never_overwritten(tmp_path: Path, random_samples, write_set) -> None:
    manifest = write_set(str(tmp_path), random_samples(5))
    with pytest.raises(DataError, match="holds a different data set: its name is 'random', not 'digits'"):
        prepare("digits", None, str(tmp_path))
    check_shards(str(tmp_path), manifest)
    assert load_manifest(str(tmp_path)) == manifest


def test_another_shard_size_is_another_set(tmp_path: Path) -> None:
    prepare("digits", None, str(tmp_path), choices=Choices(samples_per_shard=2000))
    assert prepared("digits", str(tmp_path), Choices(samples_per_shard=5000)) is not None
    with pytest.raises(DataError, match="made with --samples-per-shard 1500, not 1000"):
        prepare("digits", None, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("digit", None, "did you mean 'digits'"),
        ("digits", "somewhere", "takes no source"),
        ("cifar10", None, "needs a source"),
        ("cifar10", "/nowhere/cifar.tar.gz", "cannot read"),
    ],
)
def test_wrong_requests(tmp_path: Path, name: str, source: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(name, source, str(tmp_path / "set"))
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=f"cannot write to {tmp_path}/file/set"):
        prepare("digits", None, str(tmp_path / "file" / "set"))
