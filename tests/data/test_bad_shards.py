"""Shards of any WebDataset are read as they are; what is wrong in one is told with its name, and never run."""

import dataclasses
import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from made import cached_split
from PIL import Image

from data.errors import DataError
from data.manifest import Manifest, Shard, SplitManifest, write_manifest


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


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


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
