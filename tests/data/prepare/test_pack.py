"""Shards and their manifest: stock webdataset reads them, they are reproducible, and half a set is never a set."""

import dataclasses
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.compat import WebDataset

from data import store
from data.errors import DataError
from data.manifest import Manifest, check_shards, load_manifest
from data.prepare.pack import ENCODINGS, Form, Sample, default_encoding, write_split


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
    for sample, offset, size in zip(samples, shard.offsets, shard.sizes, strict=True):
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


def test_mixed_shapes_and_repeated_keys_are_refused(tmp_path: Path, random_samples) -> None:
    small, large = random_samples(1), random_samples(2, resolution=7)
    with pytest.raises(DataError, match=r"s0001 has shape \(7, 7, 3\)"):
        write_split(str(tmp_path), "train", [*small, large[1]])
    with pytest.raises(DataError, match="'s0000' occurs twice"):
        write_split(str(tmp_path), "train", [*small, *small])


def edited(folder: Path, edit) -> str:
    """The folder's URL, its manifest changed by `edit`."""
    value = json.loads((folder / "manifest.json").read_text())
    edit(value)
    (folder / "manifest.json").write_text(json.dumps(value))
    return str(folder)


def shard_of(value: dict) -> dict:
    return value["splits"]["train"]["shards"][0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.update(extra=1), "unknown keys: 'extra'"),
        (lambda v: v.pop("flip"), "lacks flip"),
        (lambda v: v.update(version=2), "version 2, but this program reads"),
        (lambda v: v.update(format="other"), "format is 'other'"),
        (lambda v: v.update(flip="yes"), "flip must be"),
        (lambda v: v.update(resolution="6"), "resolution must be"),
        (lambda v: v.update(resolution=0), "resolution must be"),
        (lambda v: v.update(resolution=10**6), "resolution must be"),
        (lambda v: v.update(root=1), "root must be a text"),
        (lambda v: v.update(resolution=True), "resolution must be"),
        (lambda v: v.update(channels=4), "channels must be 1 or 3"),
        (lambda v: v.update(class_names=[]), "class_names"),
        (lambda v: v.update(class_names="abc"), "class_names must be a list"),
        (lambda v: v.update(splits=[]), "splits must be an object"),
        (lambda v: v.update(splits={}), "no splits"),
        (lambda v: v["splits"].update({"Tr/ain": v["splits"].pop("train")}), "split name 'Tr/ain'"),
        (lambda v: v["splits"]["train"].update(count=13), "hold 12 images, but the split's count is 13"),
        (lambda v: v["splits"]["train"].update(count=-1), "count must be a whole number > 0"),
        (lambda v: v["splits"]["train"].update(count="12"), "count must be a whole number > 0"),
        (lambda v: v["splits"]["train"]["shards"].append(shard_of(v)), "hold 22 images"),
        (lambda v: shard_of(v).update(bytes=-1), "bytes and count must be"),
        (lambda v: shard_of(v).update(bytes=1.5), "bytes and count must be"),
        (lambda v: shard_of(v).update(bytes=1024), "beyond the shard's 1024 bytes"),
        (lambda v: shard_of(v).update(sha256="XY"), "64 lower-case hexadecimal"),
        (lambda v: shard_of(v).update(path="../evil.tar"), "stay beneath it"),
        (lambda v: shard_of(v).update(path="/etc/passwd"), "stay beneath it"),
        (lambda v: shard_of(v).update(path="s3://other/x.tar"), "stay beneath it"),
        (lambda v: shard_of(v).update(path="a\\..\\b"), "stay beneath it"),
        (lambda v: shard_of(v).update(path=7), "no path"),
        (lambda v: shard_of(v).update(path="train-000001.tar"), "listed twice: train-000001.tar"),
        (lambda v: shard_of(v)["offsets"].pop(), "9 offsets and 10 sizes"),
        (lambda v: shard_of(v)["offsets"].reverse(), "overlaps"),
        (lambda v: shard_of(v)["sizes"].__setitem__(0, -5), "whole numbers >= 0"),
        (lambda v: shard_of(v)["sizes"].__setitem__(0, "5"), "whole numbers >= 0"),
        (lambda v: shard_of(v).update(more=1), r"splits.train.shards\[0\] has unknown keys: 'more'"),
        (lambda v: v["splits"]["train"].update(shards={}), "splits.train.shards must be a list"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, random_samples, write_set, edit, message: str) -> None:
    write_set(str(tmp_path), random_samples(12))
    url = edited(tmp_path, edit)
    with pytest.raises(DataError, match=message) as caught:
        load_manifest(url)
    assert str(tmp_path / "manifest.json") in str(caught.value)
    assert "pipelines.prepare" in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "null", '"text"', "{}"])
def test_json_that_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="not a valid manifest"):
        load_manifest(str(tmp_path))


def test_the_hash_covers_every_fact(tmp_path: Path, random_samples, write_set) -> None:
    manifest: Manifest = write_set(str(tmp_path), random_samples(5))
    others = [{"name": "x"}, {"flip": False}, {"class_names": ("a", "b", "c", "e")}, {"resolution": 7}]
    hashes = {dataclasses.replace(manifest, **other).sha256 for other in others}
    assert len(hashes | {manifest.sha256}) == len(others) + 1


def test_an_unknown_split_is_told_the_known(tmp_path: Path, random_samples, write_set) -> None:
    with pytest.raises(DataError, match="has no split 'valid'; it has train"):
        write_set(str(tmp_path), random_samples(5)).split("valid")


def test_forms_are_checked_and_small_images_stay_raw() -> None:
    assert [default_encoding(resolution) for resolution in (8, 32, 64, 65, 256)] == ["raw"] * 3 + ["webp"] * 2
    for wrong in ({"resolution": 0}, {"resolution": 10**6}, {"channels": 4}, {"encoding": "jpg"}):
        with pytest.raises(DataError, match=next(iter(wrong))):
            Form(**{"resolution": 8, "channels": 3, "encoding": "raw", **wrong})
