"""LSUN's lmdb databases, made here by lmdb itself."""

import io
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
from made import cached_split
from PIL import Image

from data.errors import DataError
from data.prepare import Choices, prepare
from data.prepare.pack import Form
from data.prepare.pixels import square

CHOICES = Choices(resolution=16, samples_per_shard=4)


def jpeg(seed: int, width: int) -> bytes:
    buffer = io.BytesIO()
    image = np.random.default_rng(seed).integers(0, 256, (20, width, 3), dtype=np.uint8)
    Image.fromarray(image).save(buffer, format="JPEG", quality=75)
    return buffer.getvalue()


def database(folder: Path, count: int) -> dict[bytes, bytes]:
    content = {b"%040x" % (seed * 7919 % 1009): jpeg(seed, 20 + seed) for seed in range(count)}
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**22) as environment, environment.begin(write=True) as transaction:
        for key, value in content.items():
            transaction.put(key, value)
    (folder / "lock.mdb").unlink()
    return content


def test_the_images_come_in_the_order_of_their_keys(tmp_path: Path) -> None:
    content = {
        "train": database(tmp_path / "in" / "bedroom_train_lmdb", 21),
        "test": database(tmp_path / "in" / "bedroom_val_lmdb", 3),
    }
    (tmp_path / "in" / "README.md").write_bytes(b"x")
    told: list[str] = []
    manifest = prepare("rooms", str(tmp_path / "in"), str(tmp_path / "set"), choices=CHOICES, tell=told.append)
    assert told[0] == "note: left out 1 files that belong to no lmdb: README.md"
    assert "train        21 images, 1 class: all 21\ntest          3 images, 1 class: all 3" in told[1]
    assert manifest.class_names == ("all",)
    form = Form(resolution=16, channels=3, encoding="raw")
    for split, values in content.items():
        cached = cached_split(str(tmp_path / "set"), manifest, split, tmp_path / "cache")
        wanted = [square(values[key], form, "x")[0].transpose(2, 0, 1) for key in sorted(values)]
        assert np.array_equal(np.asarray(cached.images), np.stack(wanted))
    assert not list((tmp_path / "in").rglob("lock.mdb")), "the source was written to"


def test_without_a_database_for_it_the_last_images_are_the_test_split(tmp_path: Path) -> None:
    database(tmp_path / "bedroom_train_lmdb", 21)
    manifest = prepare("rooms", str(tmp_path / "bedroom_train_lmdb"), str(tmp_path / "set"), choices=CHOICES)
    assert {name: split.count for name, split in manifest.splits.items()} == {"train": 19, "test": 2}


def test_the_catalog_says_what_lsun_bedroom_is(tmp_path: Path) -> None:
    database(tmp_path / "in" / "bedroom_train_lmdb", 2)
    with pytest.raises(DataError, match=r"2 images of the source cannot be used:(.|\n)*pixels are fewer than 256x256"):
        prepare("lsun-bedroom256", str(tmp_path / "in"), str(tmp_path / "set"), tell=lambda note: None)


def test_what_stands_in_the_way_is_explained(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database(tmp_path / "in" / "bedroom_val_lmdb", 2)
    with pytest.raises(DataError, match=r"holds no training database, only .*bedroom_val_lmdb"):
        prepare("rooms", str(tmp_path / "in"), str(tmp_path / "set"), choices=CHOICES)
    (tmp_path / "bad_train_lmdb").mkdir()
    (tmp_path / "bad_train_lmdb" / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(DataError, match=r"cannot read the lmdb .*bad_train_lmdb"):
        prepare("rooms", str(tmp_path / "bad_train_lmdb"), str(tmp_path / "set"), choices=CHOICES)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataError, match="is an lmdb, and the package that reads it is not installed: pip install"):
        prepare("rooms", str(tmp_path / "bad_train_lmdb"), str(tmp_path / "set"), choices=CHOICES)
