"""CIFAR-10 from the real archive; nothing but its official bytes gets in."""

import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data import storage
from data.cache import cached_split
from data.catalog import facts
from data.errors import DataError
from data.shards import Manifest, write_manifest, write_split
from data.sources import cifar10

KNOWN = facts("cifar10")


@pytest.fixture(scope="module")
def folder(shared: Path) -> Iterator[Path]:
    """The real batch files, unpacked by our own code from the real archive."""
    archive = shared / "datasets" / "cifar-10-python.tar.xz"
    if not archive.is_file():
        pytest.skip(f"no CIFAR-10 archive at {archive}")
    with cifar10.unpacked(str(archive)) as unpacked:
        yield unpacked


def official(folder: Path, name: str) -> tuple[np.ndarray, list[int]]:
    """A slow, independent reading of a batch whose MD5 is checked here."""
    raw = (folder / name).read_bytes()
    assert hashlib.md5(raw).hexdigest() == cifar10.MD5[name]
    batch = pickle.loads(raw, encoding="latin1")
    return batch["data"].reshape(-1, 3, 32, 32), batch["labels"]


@pytest.mark.slow
def test_every_image_and_label_is_the_official_one(folder: Path) -> None:
    for split, count in KNOWN.splits.items():
        samples = cifar10.samples(split, str(folder))
        for name in cifar10.BATCHES[split]:
            pixels, labels = official(folder, name)
            batch = list(islice(samples, 10_000))
            assert np.array_equal(np.stack([sample.image for sample in batch]), pixels.transpose(0, 2, 3, 1))
            assert [sample.label for sample in batch] == labels
            assert batch[-1].key == f"{name}-09999"
            count -= len(batch)
        assert count == 0
        assert next(samples, None) is None


@pytest.mark.slow
def test_shards_and_cache_keep_every_pixel(folder: Path, tmp_path: Path) -> None:
    samples = islice(cifar10.samples("train", str(folder)), 3000)
    split = write_split(str(tmp_path / "set"), "train", samples)
    manifest = Manifest(
        name=KNOWN.name,
        resolution=KNOWN.resolution,
        channels=KNOWN.channels,
        class_names=KNOWN.class_names,
        flip=KNOWN.flip,
        splits={"train": split},
    )
    write_manifest(str(tmp_path / "set"), manifest)
    cached = cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")
    pixels, labels = official(folder, "data_batch_1")
    assert np.array_equal(cached.images, pixels[:3000])
    assert cached.labels.tolist() == labels[:3000]


def test_an_archive_with_other_bytes_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(DataError, match=r"data_batch_1 \(4 bytes\) has the MD5 .* official file has c99cafc"):
        next(cifar10.samples("train", str(archive)))


def test_an_archive_without_the_batches(tmp_path: Path) -> None:
    archive = tmp_path / "other.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../readme"), io.BytesIO())
    with pytest.raises(DataError, match=r"lacks data_batch_1, .*test_batch"):
        next(cifar10.samples("train", str(archive)))


@pytest.mark.parametrize("content", [b"", b"not an archive", b"\x1f\x8b\x08\x00broken"])
def test_a_file_that_is_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the CIFAR-10 archive .*a\.tar\.gz"):
        next(cifar10.samples("train", str(tmp_path / "a.tar.gz")))


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        next(cifar10.samples("train", str(tmp_path / "nothing.tar.gz")))
    with pytest.raises(DataError, match=r"cannot read .*data_batch_1"):
        next(cifar10.samples("train", str(tmp_path)))


def test_a_url_is_downloaded_first(bucket: str) -> None:
    storage.write_bytes(f"{bucket}/cifar.tar.gz", b"not an archive")
    with pytest.raises(DataError, match=rf"cannot read the CIFAR-10 archive {bucket}/cifar\.tar\.gz"):
        next(cifar10.samples("train", f"{bucket}/cifar.tar.gz"))


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_a_batch_can_name_numpy_arrays_only(tmp_path: Path) -> None:
    bomb = pickle.dumps({b"data": _Bomb(tmp_path / "exploded"), b"labels": []})
    with pytest.raises(DataError, match=r"posix\.mkdir is not part of a CIFAR-10 batch"):
        cifar10._parsed(bomb, "test_batch")
    assert not (tmp_path / "exploded").exists()
