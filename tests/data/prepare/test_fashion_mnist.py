"""Fashion-MNIST from its four files; nothing but their official content gets in."""

import gzip
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from made import cached_split

from data import store
from data.errors import DataError
from data.prepare import Choices, fashion_mnist, prepare

REAL = Path(os.environ.get("BCM_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
CHOICES = Choices(samples_per_shard=30_000)
CHOICES_OF_MADE = Choices(samples_per_shard=4)


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">{1 + values.ndim}i", 0x800 + values.ndim, *values.shape) + values.tobytes()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder with files of the same form, whose content counts as official, and what is in them."""
    rng = np.random.default_rng(0)
    arrays = {}
    folder = tmp_path / "in"
    folder.mkdir()
    for prefix, count in (("train", 11), ("t10k", 3)):
        arrays[f"{prefix}-images-idx3-ubyte.gz"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte.gz"] = rng.integers(0, 10, count, np.uint8)
    for name, values in arrays.items():
        (folder / name).write_bytes(gzip.compress(idx(values)))
    hashes = {name: hashlib.sha256(idx(values)).hexdigest() for name, values in arrays.items()}
    monkeypatch.setattr(fashion_mnist, "SHA256", hashes)
    return folder, arrays


@pytest.mark.skipif(not REAL.is_dir(), reason="needs Debian's dataset-fashion-mnist, or BCM_FASHION_MNIST=FOLDER")
def test_the_real_files_are_70_000_images_of_ten_classes(tmp_path: Path) -> None:
    told: list[str] = []
    manifest = prepare("fashion-mnist", str(REAL), str(tmp_path / "set"), choices=CHOICES, tell=told.append)
    assert {split: part.count for split, part in manifest.splits.items()} == {"train": 60_000, "test": 10_000}
    assert (manifest.resolution, manifest.channels, manifest.flip) == (28, 1, False)
    assert manifest.class_names[0] == "T-shirt/top" and manifest.class_names[9] == "Ankle boot"
    assert "T-shirt/top 6,000" in told[-1] and "Ankle boot 1,000" in told[-1]
    whole = cached_split(str(tmp_path / "set"), manifest, "train", tmp_path)
    packed = (REAL / "train-images-idx3-ubyte.gz").read_bytes()
    assert np.asarray(whole.images).tobytes() == gzip.decompress(packed)[16:]
    assert np.bincount(np.asarray(whole.labels)).tolist() == [6000] * 10


@pytest.mark.parametrize("remote", [False, True])
def test_files_of_that_form_keep_order_and_labels(made, remote: bool, bucket: str, tmp_path: Path) -> None:
    folder, arrays = made
    source = bucket if remote else str(folder)
    for path in folder.iterdir() if remote else ():
        store.write_bytes(f"{bucket}/deep/{path.name}", path.read_bytes())
    manifest = prepare("fashion-mnist", source, str(tmp_path / "set"), choices=CHOICES_OF_MADE)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        whole = cached_split(str(tmp_path / "set"), manifest, split, tmp_path / split)
        assert np.array_equal(np.asarray(whole.images)[:, 0], arrays[f"{prefix}-images-idx3-ubyte.gz"])
        assert np.array_equal(np.asarray(whole.labels), arrays[f"{prefix}-labels-idx1-ubyte.gz"])


@pytest.mark.parametrize("name", fashion_mnist.SHA256)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("other", r"has 1,234 bytes and the SHA-256 .*MNIST have the same names.*download it again"),
        ("short", r"has [\d,]+ bytes and the SHA-256"),
        ("cut", r"cannot read .*EOFError.*download it again"),
        ("unpacked", r"cannot read .*BadGzipFile"),
        ("missing", r"give a folder with all four files"),
    ],
)
def test_a_file_that_is_not_the_official_one_is_named(made, name: str, fault: str, message: str, tmp_path) -> None:
    folder, arrays = made
    content = idx(arrays[name])
    place = folder / name
    place.write_bytes(
        {
            "other": gzip.compress(bytes(1234)),
            "short": gzip.compress(content[:-1]),
            "cut": gzip.compress(content)[:-9],
            "unpacked": content,
            "missing": b"",
        }[fault]
    )
    if fault == "missing":
        place.unlink()
    with pytest.raises(DataError, match=message) as raised:
        prepare("fashion-mnist", str(folder), str(tmp_path / "set"), choices=CHOICES_OF_MADE)
    assert name in str(raised.value)
    assert not (tmp_path / "set" / "manifest.json").exists()
