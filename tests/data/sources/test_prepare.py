"""From an official source to a set in storage, once."""

from pathlib import Path

import numpy as np
import pytest

from data import storage
from data.cache import cached_split
from data.errors import DataError
from data.shards import check_shards, load_manifest
from data.sources import digits, prepare, prepared


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "digits") if request.param == "local" else request.getfixturevalue("bucket") + "/digits"


def test_digits_end_to_end(place: str, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    manifest = prepare("digits", None, place, progress=lambda *news: told.append(news))
    assert told == [("train", 500, 1500), ("train", 1000, 1500), ("train", 1500, 1500), ("test", 297, 297)]
    assert load_manifest(place) == manifest
    check_shards(place, manifest)
    assert storage.list_names(place) == [
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
    prepare("digits", None, str(tmp_path), samples_per_shard=2000)
    assert prepared("digits", str(tmp_path), samples_per_shard=5000) is not None
    with pytest.raises(DataError, match="its samples per shard is 1500, not 1000"):
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
