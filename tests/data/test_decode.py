"""Raw pixels are taken as they lie, many at a time, and mean the same as to any reader of images."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.decode import decode_images, decode_shard, mapped, raw_header
from data.errors import DataError
from data.manifest import Manifest, Shard, SplitManifest
from data.prepare.pack import pack, shard_of


def described(channels: int, shard: Shard) -> Manifest:
    return Manifest(
        name="made",
        resolution=6,
        channels=channels,
        class_names=("a", "b", "c", "d"),
        flip=False,
        splits={"train": SplitManifest(count=shard.count, shards=(shard,))},
    )


@pytest.mark.parametrize(("channels", "encoding"), [(1, "raw"), (3, "raw"), (1, "png"), (3, "png"), (3, "webp")])
def test_every_encoding_gives_the_pixels_back(tmp_path: Path, random_samples, channels: int, encoding: str) -> None:
    samples = random_samples(9, channels=channels)
    payload, *where = pack(samples, encoding)
    (tmp_path / "x.tar").write_bytes(payload)
    shard = shard_of("x.tar", payload, *where)
    images, labels = decode_shard(tmp_path / "x.tar", "x.tar", shard, described(channels, shard))
    expected = np.stack([sample.image.reshape(6, 6, channels).transpose(2, 0, 1) for sample in samples])
    assert np.array_equal(images, expected)
    assert labels.tolist() == [sample.label for sample in samples]
    some = np.array([7, 0, 7])
    raw = mapped(tmp_path / "x.tar")
    again = decode_images(raw, shard.spans[some], described(channels, shard), "x.tar")
    assert np.array_equal(again, expected[some])


def test_other_readers_see_the_same_pixels(tmp_path: Path, random_samples) -> None:
    samples = random_samples(3)
    payload = pack(samples, "raw")[0]
    with tarfile.open(fileobj=io.BytesIO(payload)) as tar:
        for sample in samples:
            member = tar.extractfile(f"{sample.key}.ppm")
            assert member
            assert np.array_equal(np.asarray(Image.open(member)), sample.image)


def test_a_raw_image_of_another_size_is_named(tmp_path: Path, random_samples) -> None:
    packed, *where = pack(random_samples(3), "raw")
    payload = bytearray(packed)
    shard = shard_of("x.tar", packed, *where)
    payload[shard.spans[1, 0] : shard.spans[1, 0] + 6] = b"P6\n4 9"
    (tmp_path / "x.tar").write_bytes(payload)
    with pytest.raises(DataError, match=r"sample s0001: the image is 9x4 with 3 channels, .* states 6x6 with 3"):
        decode_images(mapped(tmp_path / "x.tar"), shard.spans, described(3, shard), "x.tar")


def test_an_image_with_far_too_many_bytes_is_refused_before_it_is_read(tmp_path: Path, random_samples) -> None:
    payload, *where = pack(random_samples(1), "raw")
    (tmp_path / "x.tar").write_bytes(payload + bytes(5 * 2**20))
    shard = shard_of("x.tar", payload, *where)
    with pytest.raises(DataError, match="has 5000000 bytes, too many for its size"):
        spans = np.array([[shard.spans[0, 0], 5_000_000]])
        decode_images(mapped(tmp_path / "x.tar"), spans, described(3, shard), "x.tar")


def test_the_header_is_that_of_a_plain_ppm() -> None:
    assert raw_header(32, 3) == b"P6\n32 32\n255\n"
    assert raw_header(8, 1) == b"P5\n8 8\n255\n"
