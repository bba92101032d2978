"""The manifest: read strictly, small in memory, the same in every form."""

import dataclasses
import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.manifest import Manifest, Shard, SplitManifest, load_manifest, parse_manifest

MADE = {"files": 1, "bytes": 9, "names": "a", "versions": "b", "options": {"fit": "crop", "flip": True, "n": None}}


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
        (lambda v: v.update(extra=1), "unknown key 'extra'"),
        (lambda v: v.pop("flip"), "missing key 'flip'"),
        (lambda v: v.update(version=3), "version: input should be 2, not 3"),
        (lambda v: v.update(format="other"), "format: input should be 'bcm-shards', not 'other'"),
        (lambda v: v.update(flip="yes"), "flip: input should be a valid boolean, not 'yes'"),
        (lambda v: v.update(resolution="6"), "resolution: input should be a valid integer"),
        (lambda v: v.update(resolution=0), "resolution must be"),
        (lambda v: v.update(resolution=10**6), "resolution must be"),
        (lambda v: v.update(root=1), "root: input should be a valid string"),
        (lambda v: v.update(resolution=True), "resolution: input should be a valid integer"),
        (lambda v: v.update(channels=4), "channels must be 1 or 3"),
        (lambda v: v.update(class_names=[]), "class_names"),
        (lambda v: v.update(class_names="abc"), "class_names: input should be a valid array"),
        (lambda v: v.update(splits=[]), "splits: input should be an object"),
        (lambda v: v.update(splits={}), "no splits"),
        (lambda v: v["splits"].update({"Tr/ain": v["splits"].pop("train")}), "split name 'Tr/ain'"),
        (lambda v: v["splits"]["train"].update(count=13), "hold 12 images, but the split's count is 13"),
        (lambda v: v["splits"]["train"].update(count=-1), "count must be a whole number > 0"),
        (lambda v: v["splits"]["train"].update(count="12"), "splits.train.count: input should be a valid integer"),
        (lambda v: v["splits"]["train"]["shards"].append(shard_of(v)), "hold 22 images"),
        (lambda v: shard_of(v).update(bytes=-1), "bytes is -1, which is negative"),
        (lambda v: shard_of(v).update(bytes=1.5), r"shards.0.bytes: input should be a valid integer"),
        (lambda v: shard_of(v).update(bytes=1024), "beyond the shard's 1024 bytes"),
        (lambda v: shard_of(v).update(sha256="XY"), "64 lower-case hexadecimal"),
        (lambda v: shard_of(v).update(path="../evil.tar"), "stay beneath it"),
        (lambda v: shard_of(v).update(path="/etc/passwd"), "stay beneath it"),
        (lambda v: shard_of(v).update(path="s3://other/x.tar"), "stay beneath it"),
        (lambda v: shard_of(v).update(path="a\\..\\b"), "stay beneath it"),
        (lambda v: shard_of(v).update(path=7), "shards.0.path: input should be a valid string"),
        (lambda v: shard_of(v).update(path="train-000001.tar"), "listed twice: train-000001.tar"),
        (lambda v: shard_of(v).update(places=[512, 9]), "shards.0.places: input should be a valid string"),
        (lambda v: shard_of(v).update(places="512"), "places are neither first.stride.size nor base64"),
        (lambda v: shard_of(v).update(places="1024+10*121"), "the image at byte 1034 overlaps what lies before it"),
        (lambda v: shard_of(v).update(places="0+1536*121"), "the image at byte 0 overlaps"),
        (lambda v: shard_of(v).update(places="1024+9999999*121"), "beyond the shard's"),
        (lambda v: shard_of(v).update(places="AAQAAHkAAAA="), "count is 10, but it has 1 places"),
        (lambda v: shard_of(v).update(count=9), "hold 11 images"),
        (lambda v: shard_of(v).update(count=0), "listed with no samples"),
        (lambda v: shard_of(v).update(count=10**12, bytes=10**18), "more than a shard may hold"),
        (lambda v: shard_of(v).update(more=1), "unknown key 'splits.train.shards.0.more'"),
        (lambda v: v["splits"]["train"].update(shards={}), "splits.train.shards: input should be a valid array"),
        (lambda v: v.update(made={}), "missing key 'made.files'"),
        (lambda v: v.update(made=MADE | {"bytes": "9"}), "made.bytes: input should be a valid integer, not '9'"),
        (lambda v: v.update(made=MADE | {"options": {"fit": []}}), "made.options.fit"),
        (lambda v: v.update(made=MADE | {"by": "x"}), "unknown key 'made.by'"),
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


def test_the_hash_does_not_cover_what_the_set_was_made_of(tmp_path: Path, random_samples, write_set) -> None:
    manifest: Manifest = write_set(str(tmp_path), random_samples(5))
    found = load_manifest(edited(tmp_path, lambda v: v.update(made=MADE)))
    assert found.made is not None and found.made.options == MADE["options"] and found.made.left_out == {}
    assert found.sha256 == manifest.sha256 and found == manifest
    assert pickle.loads(pickle.dumps(found)).made == found.made


def test_an_unknown_split_is_told_the_known(tmp_path: Path, random_samples, write_set) -> None:
    with pytest.raises(DataError, match="has no split 'valid'; it has train"):
        write_set(str(tmp_path), random_samples(5)).split("valid")


@pytest.mark.parametrize(
    ("offsets", "sizes", "form"),
    [
        ([1024, 2560, 4096], [121, 121, 121], "1024+1536*121"),
        ([512], [7], "512+0*7"),
        ([1024, 2560, 5120], [121, 121, 121], None),
        ([1024, 2560, 4096], [121, 120, 121], None),
        ([1024, 2**31, 2**33], [2**30, 2**32 - 1, 3], None),
    ],
)
def test_places_are_kept_exactly_and_shortly(offsets: list[int], sizes: list[int], form: str | None) -> None:
    shard = Shard.of("a.tar", 2**34, "0" * 64, offsets, sizes)
    assert (shard.offsets.tolist(), shard.sizes.tolist()) == (offsets, sizes)
    assert shard.places == form if form else "+" not in shard.places[:5]
    assert len(shard.places) <= max(20, 11 * len(offsets) + 4)


def test_a_manifest_of_version_1_is_read(tmp_path: Path, random_samples, write_set) -> None:
    manifest: Manifest = write_set(str(tmp_path), random_samples(25))
    value = json.loads(manifest.to_json()) | {"version": 1}
    for shard, entry in zip(value["splits"]["train"]["shards"], manifest.splits["train"].shards, strict=True):
        del shard["places"]
        shard |= {"offsets": entry.offsets.tolist(), "sizes": entry.sizes.tolist()}
    assert parse_manifest(json.dumps(value), "old") == manifest
    sizes = value["splits"]["train"]["shards"][0]["sizes"]
    for wrong in (-5, float(sizes[0]), str(sizes[0]), True, None):
        with pytest.raises(DataError, match="old is not a valid manifest"):
            value["splits"]["train"]["shards"][0]["sizes"] = [wrong, *sizes[1:]]
            parse_manifest(json.dumps(value), "old")
    value["splits"]["train"]["shards"][0]["sizes"] = sizes
    with pytest.raises(DataError, match="old is not a valid manifest"):
        parse_manifest(json.dumps(value | {"version": 1.5}), "old")


@pytest.mark.parametrize("even", [True, False], ids=["raw shards", "shards of odd sizes"])
def test_a_million_images_cost_no_python_integers(even: bool) -> None:
    rng = np.random.default_rng(0)
    shards = []
    for number in range(1000):
        sizes = np.full(1000, 12301) if even else rng.integers(5000, 12000, 1000)
        offsets = 1024 + np.concatenate([[0], (1024 + -(-sizes // 512) * 512).cumsum()[:-1]])
        shards.append(Shard.of(f"train-{number:06d}.tar", 2**30, "0" * 64, offsets.tolist(), sizes.tolist()))
    split = SplitManifest(count=10**6, shards=tuple(shards))
    manifest = Manifest(name="big", resolution=64, channels=3, class_names=("x",), flip=True, splits={"train": split})
    text = manifest.to_json()
    tracemalloc.start()
    again = parse_manifest(text, "big")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 16 bytes an image are the two arrays.
    assert held < 40e6 and peak < 100e6
    assert pickle.loads(pickle.dumps(again)) == manifest
