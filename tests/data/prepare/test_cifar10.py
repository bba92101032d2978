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
from made import cached_split
from webdataset.compat import WebDataset

from data import store
from data.catalog import facts
from data.errors import DataError
from data.manifest import Manifest
from data.prepare import cifar10, prepare

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


@pytest.fixture(scope="module")
def prepared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    place = tmp_path_factory.mktemp("cifar10")
    return place, prepare("cifar10", str(folder), str(place))


@pytest.mark.slow
def test_stock_webdataset_reads_the_official_images_and_labels(folder: Path, prepared: tuple[Path, Manifest]) -> None:
    place, manifest = prepared
    for split, part in manifest.splits.items():
        assert part.count == KNOWN.splits[split]
        # Its own decoder for images is slower than a raw image needs; test_shards has that.
        stream = iter(WebDataset([str(place / shard.path) for shard in part.shards], shardshuffle=False))
        for name in cifar10.BATCHES[split]:
            pixels, labels = official(folder, name)
            batch = list(islice(stream, 10_000))
            raw = np.stack([np.frombuffer(sample["ppm"], np.uint8, 3072, len(b"P6\n32 32\n255\n")) for sample in batch])
            assert {sample["ppm"][:13] for sample in batch} == {b"P6\n32 32\n255\n"}
            assert np.array_equal(raw.reshape(-1, 32, 32, 3), pixels.transpose(0, 2, 3, 1))
            assert [int(sample["cls"]) for sample in batch] == labels
            assert [sample["__key__"] for sample in batch] == [f"{name}-{index:05d}" for index in range(10_000)]
        assert next(stream, None) is None


@pytest.mark.slow
def test_our_reader_gives_the_official_images_and_labels(
    folder: Path, prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    place, manifest = prepared
    for split, names in cifar10.BATCHES.items():
        cached = cached_split(str(place), manifest, split, tmp_path / "cache")
        found = [official(folder, name) for name in names]
        assert np.array_equal(np.asarray(cached.images), np.concatenate([pixels for pixels, _ in found]))
        assert cached.labels.tolist() == [label for _, labels in found for label in labels]


def take(source: str, folder: Path) -> None:
    prepare("cifar10", source, str(folder / "set"))


def test_an_archive_with_other_bytes_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(DataError, match=r"data_batch_1 \(4 bytes\) has the MD5 .* official file has c99cafc"):
        take(str(archive), tmp_path)


def test_an_archive_without_the_batches(tmp_path: Path) -> None:
    archive = tmp_path / "other.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../readme"), io.BytesIO())
    with pytest.raises(DataError, match=r"lacks data_batch_1, .*test_batch"):
        take(str(archive), tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"\x1f\x8b\x08\x00broken"])
def test_a_file_that_is_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the CIFAR-10 archive .*a\.tar\.gz"):
        take(str(tmp_path / "a.tar.gz"), tmp_path)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        take(str(tmp_path / "nothing.tar.gz"), tmp_path)
    with pytest.raises(DataError, match=r"cannot read .*data_batch_1"):
        take(str(tmp_path), tmp_path)


def test_a_url_is_downloaded_first(bucket: str, tmp_path: Path) -> None:
    store.write_bytes(f"{bucket}/cifar.tar.gz", b"not an archive")
    with pytest.raises(DataError, match=rf"cannot read the CIFAR-10 archive {bucket}/cifar\.tar\.gz"):
        take(f"{bucket}/cifar.tar.gz", tmp_path)


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
