"""Shards and their manifest: stock webdataset reads them, they are reproducible, and half a set is never a set."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from made import write_split
from PIL import Image
from webdataset.compat import WebDataset

from data import store
from data.errors import DataError
from data.manifest import check_shards, load_manifest
from data.prepare.pack import ENCODINGS, Form, Sample, default_encoding


def read_by_webdataset(folder: Path, names: list[str], mode: str) -> Iterator[tuple[str, np.ndarray, int]]:
    """What stock webdataset's own decoder makes of the shards."""
    stream = WebDataset([str(folder / name) for name in names], shardshuffle=False).decode(mode)
    for sample in iter(stream):  # pyright: ignore[reportArgumentType, reportCallIssue]
        (image,) = (value for key, value in sample.items() if key in ("ppm", "pgm", "png", "webp"))
        yield sample["__key__"], image, sample["cls"]


@pytest.mark.parametrize(("channels", "mode"), [(1, "l8"), (3, "rgb8")])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_stock_webdataset_reads_what_was_written(
    tmp_path: Path, random_samples, channels: int, mode: str, encoding: str
) -> None:
    samples = random_samples(25, channels=channels)
    shards = write_split(str(tmp_path), "train", samples, samples_per_shard=10, encoding=encoding).shards
    assert [shard.path for shard in shards] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert [shard.count for shard in shards] == [10, 10, 5]
    found = list(read_by_webdataset(tmp_path, [shard.path for shard in shards], mode))
    assert [(key, label) for key, _, label in found] == [(sample.key, sample.label) for sample in samples]
    assert all(np.array_equal(image, sample.image) for (_, image, _), sample in zip(found, samples, strict=True))


def test_shards_are_plain_ustar_with_fixed_owners_and_times(tmp_path: Path, random_samples, write_set) -> None:
    write_set(str(tmp_path), random_samples(3))
    raw = (tmp_path / "train-000000.tar").read_bytes()
    assert raw[257:263] == b"ustar\0"
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.type, m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(b"0", 0, 0, 0, "", "")}
    assert all(not member.pax_headers for member in members)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path, random_samples, write_set) -> None:
    first = write_set(str(tmp_path / "a"), random_samples(12))
    second = write_set(str(tmp_path / "b"), random_samples(12))
    assert first.sha256 == second.sha256
    for name in ("train-000000.tar", "train-000001.tar", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert write_set(str(tmp_path / "c"), random_samples(12, seed=1)).sha256 != first.sha256


def test_offsets_point_at_the_images(tmp_path: Path, random_samples, write_set) -> None:
    samples = random_samples(7)
    (shard,) = write_set(str(tmp_path), samples).splits["train"].shards
    raw = (tmp_path / shard.path).read_bytes()
    for sample, (offset, size) in zip(samples, shard.spans, strict=True):
        image = np.asarray(Image.open(io.BytesIO(raw[offset : offset + size])))
        assert np.array_equal(image, sample.image)


def test_the_manifest_round_trips_on_disk_and_on_s3(tmp_path: Path, bucket: str, random_samples, write_set) -> None:
    for url in (str(tmp_path), f"{bucket}/set"):
        manifest = write_set(url, random_samples(5))
        loaded = load_manifest(url)
        assert loaded == manifest
        assert loaded.sha256 == manifest.sha256
        check_shards(url, loaded)


def test_an_interrupted_write_leaves_no_data_set(tmp_path: Path, random_samples) -> None:
    def breaking() -> Iterator[Sample]:
        yield from random_samples(15)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_split(str(tmp_path), "train", breaking(), samples_per_shard=10)
    assert store.list_names(str(tmp_path)) == ["train-000000.tar"]
    with pytest.raises(DataError, match=r"no data set at .*python -m pipelines\.prepare"):
        load_manifest(str(tmp_path))


def test_a_missing_and_a_short_shard_are_named(tmp_path: Path, random_samples, write_set) -> None:
    manifest = write_set(str(tmp_path), random_samples(25))
    second = tmp_path / "train-000001.tar"
    whole = second.read_bytes()
    second.write_bytes(whole[:-512])
    with pytest.raises(DataError, match=rf"train-000001\.tar has {len(whole) - 512} bytes, .* states {len(whole)}"):
        check_shards(str(tmp_path), manifest)
    second.unlink()
    (tmp_path / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar is missing \(2 shards"):
        check_shards(str(tmp_path), manifest)


@pytest.mark.parametrize(
    ("key", "image", "label"),
    [
        ("a.b", np.zeros((4, 4), np.uint8), 0),
        ("../a", np.zeros((4, 4), np.uint8), 0),
        ("", np.zeros((4, 4), np.uint8), 0),
        ("a", np.zeros((4, 4), np.float32), 0),
        ("a", np.zeros((4, 4, 4), np.uint8), 0),
        ("a", np.zeros((4, 4), np.uint8), -1),
    ],
)
def test_samples_that_a_shard_cannot_hold(key: str, image: np.ndarray, label: int) -> None:
    with pytest.raises(DataError, match="sample"):
        Sample(key, image, label)


def test_forms_are_checked_and_small_images_stay_raw() -> None:
    assert [default_encoding(resolution) for resolution in (8, 32, 64, 65, 256)] == ["raw"] * 3 + ["webp"] * 2
    for wrong in ({"resolution": 0}, {"resolution": 10**6}, {"channels": 4}, {"encoding": "jpg"}):
        with pytest.raises(DataError, match=next(iter(wrong))):
            Form(**{"resolution": 8, "channels": 3, "encoding": "raw", **wrong})
