"""Existing WebDatasets: described where they lie, or written anew."""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from made import cached_split
from PIL import Image
from webdataset.writer import TarWriter

from data import store
from data.errors import DataError
from data.manifest import check_shards
from data.prepare import Choices, prepare

Members = Sequence[tuple[str, bytes]]


def image(seed: int, height: int = 6, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(seed: int, height: int = 6, width: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image(seed, height, width)).save(buffer, format="PNG")
    return buffer.getvalue()


def tar(path: Path, members: Members, form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return path


def by_webdataset(path: Path, seeds: Sequence[int], label: str = "cls") -> None:
    """A shard as stock webdataset writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, TarWriter(file) as writer:
        for seed in seeds:
            value = seed % 3 if label == "cls" else {"label": seed % 3, "text": "x"}
            writer.write({"__key__": f"some/{seed:05d}", "png": png(seed), label: value, "txt": "a caption"})


def check(url: str, cache: Path, seeds: Sequence[int], split: str = "train", labelled: bool = True) -> None:
    manifest = prepare("mine", url, url)
    check_shards(url, manifest)
    cached = cached_split(url, manifest, split, cache)
    assert np.array_equal(np.asarray(cached.images), np.stack([image(seed).transpose(2, 0, 1) for seed in seeds]))
    assert cached.labels.tolist() == [seed % 3 if labelled else 0 for seed in seeds]


@pytest.mark.parametrize("label", ["cls", "json"])
def test_stock_shards_are_trained_on_as_they_are(tmp_path: Path, label: str) -> None:
    root = tmp_path / "set"
    by_webdataset(root / "imagenet-train-000000.tar", range(10), label)
    by_webdataset(root / "imagenet-train-000001.tar", range(10, 17), label)
    by_webdataset(root / "imagenet-val-000000.tar", range(20, 25), label)
    before = {path: path.read_bytes() for path in root.iterdir()}
    check(str(root), tmp_path / "cache", range(17))
    check(str(root), tmp_path / "cache", range(20, 25), "test")
    assert {path: path.read_bytes() for path in root.iterdir() if path.suffix == ".tar"} == before
    scanned_at = (root / "manifest.json").stat().st_mtime_ns
    prepare("mine", str(root), str(root))
    assert (root / "manifest.json").stat().st_mtime_ns == scanned_at


def test_the_manifest_may_lie_elsewhere_and_the_tars_on_a_server(tmp_path: Path, bucket: str) -> None:
    by_webdataset(tmp_path / "a.tar", range(8))
    store.write_bytes(f"{bucket}/deep/a.tar", (tmp_path / "a.tar").read_bytes())
    manifest = prepare("mine", bucket, str(tmp_path / "here"))
    assert manifest.root == bucket and manifest.split("train").shards[0].path == "deep/a.tar"
    cached = cached_split(str(tmp_path / "here"), manifest, "train", tmp_path / "cache")
    assert np.array_equal(np.asarray(cached.images), np.stack([image(seed).transpose(2, 0, 1) for seed in range(8)]))
    check_shards(str(tmp_path / "here"), manifest)
    store.remove(f"{bucket}/deep/a.tar")
    with pytest.raises(DataError, match=rf"{bucket}/deep/a\.tar is missing"):
        check_shards(str(tmp_path / "here"), manifest)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_sets_without_labels(tmp_path: Path, form: int) -> None:
    names = [f"{'folder/' * 40}{seed:03d}" for seed in range(4)]
    tar(tmp_path / "set" / "a.tar", [(f"{name}.png", png(seed)) for seed, name in enumerate(names)], form)
    check(str(tmp_path / "set"), tmp_path / "cache", range(4), labelled=False)
    assert prepare("mine", str(tmp_path / "set"), str(tmp_path / "set")).class_names == ("all",)


def test_other_sizes_are_written_anew_on_request(tmp_path: Path) -> None:
    members = [
        (f"{seed}.{end}", payload) for seed in range(9) for end, payload in (("cls", b"0"), ("png", png(seed, 8, 10)))
    ]
    tar(tmp_path / "in" / "a.tar", members)
    with pytest.raises(DataError, match=r"has 8x10 pixels and 3 channels.*add --rewrite --resolution N"):
        prepare("mine", str(tmp_path / "in"), str(tmp_path / "set"))
    choices = Choices(resolution=4, rewrite=True, samples_per_shard=4)
    manifest = prepare("mine", str(tmp_path / "in"), str(tmp_path / "set"), choices=choices)
    assert [shard.count for shard in manifest.split("train").shards] == [4, 4, 1]
    cached = cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")
    middle = image(8, 8, 10)[:, 1:9].astype(int).reshape(4, 2, 4, 2, 3).sum((1, 3))
    assert np.array_equal(np.asarray(cached.images)[8], ((middle + 2) // 4).transpose(2, 0, 1))
    assert set(cached.labels.tolist()) == {0}


GOOD = [("a.cls", b"0"), ("a.png", png(0))]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*GOOD, ("a.pkl", b"x")], "'a.pkl' is refused, because files of that kind can run code"),
        ([*GOOD, ("a.jpg", png(1))], "'a' has two images"),
        ([("a.cls", b"x"), ("a.png", png(0))], "label 'x' is not a whole number"),
        ([("a.cls", b"9" * 25), ("a.png", png(0))], "label '9+' is not a whole number"),
        ([*GOOD, ("b.png", png(1))], r"b\.png has no label in \.cls, but others have"),
        ([("a.cls", b"0")], "there are no images"),
        ([("a.png", b"no image")], r"not readable .*: a\.png"),
        ([("a.json", b"["), ("a.png", png(0))], "not valid JSON"),
    ],
)
def test_members_that_are_refused(tmp_path: Path, members: Members, message: str) -> None:
    tar(tmp_path / "set" / "a.tar", members)
    with pytest.raises(DataError, match=message):
        prepare("mine", str(tmp_path / "set"), str(tmp_path / "set"))
    assert not (tmp_path / "set" / "manifest.json").exists()


@pytest.mark.parametrize("cut", [0, 100, 512, 700, 1024 + 300])
def test_a_cut_tar_is_never_a_shorter_set(tmp_path: Path, cut: int) -> None:
    path = tar(tmp_path / "set" / "a.tar", [*GOOD, ("b.cls", b"0"), ("b.png", png(1))])
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2].offset
    os.truncate(path, third + cut)
    with pytest.raises(DataError, match=r"a\.tar (is cut off after|is not a whole tar file)"):
        prepare("mine", str(tmp_path / "set"), str(tmp_path / "set"))


def test_links_and_names_are_never_followed_nor_written(tmp_path: Path) -> None:
    path = tar(tmp_path / "set" / "a.tar", [("../../evil.cls", b"0"), ("../../evil.png", png(0))])
    check(str(tmp_path / "set"), tmp_path / "cache", [0])
    assert not list(tmp_path.parent.glob("evil*")) + list(tmp_path.rglob("evil*"))
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (tmp_path / "set" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"'b\.png' is a link or a device"):
        prepare("mine", str(tmp_path / "set"), str(tmp_path / "set"))


def test_a_manifest_of_elsewhere_round_trips(tmp_path: Path) -> None:
    by_webdataset(tmp_path / "in" / "a.tar", range(3))
    manifest = prepare("mine", str(tmp_path / "in"), str(tmp_path / "out"))
    stored = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert stored["root"] == manifest.root == str(tmp_path / "in")
