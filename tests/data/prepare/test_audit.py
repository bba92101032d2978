"""Every byte is compared, every image counted, and a contact sheet shows them in order."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import write_split

from data.errors import DataError
from data.manifest import Manifest
from data.prepare.audit import contact_sheet, examined, require_sound
from data.prepare.write import in_turn


def sent(call: Any, shards: Sequence[Any], manifest: Manifest) -> Iterator[Any]:
    """As a runner would: what travels to each task is less than the whole manifest."""
    assert len(call.keywords["facts"].to_json()) < len(manifest.to_json())
    return in_turn(call, shards)


def test_a_sound_set_is_counted_and_sampled(tmp_path: Path, random_samples, write_set) -> None:
    samples = random_samples(25)
    manifest = write_set(str(tmp_path), samples)
    seen = list(examined(str(tmp_path), manifest, 6, lambda call, shards: sent(call, shards, manifest)))
    assert [found.problems for found in seen] == [()] * 3
    assert sum(found.labels for found in seen).tolist() == [7, 6, 6, 6]  # type: ignore[union-attr]
    assert [len(found.images) for found in seen] == [2, 2, 2]
    kept = np.concatenate([found.images for found in seen])
    wanted = [samples[place] for place in (0, 5, 10, 15, 20, 22)]
    assert np.array_equal(kept, np.stack([sample.image.transpose(2, 0, 1) for sample in wanted]))
    assert np.concatenate([found.kept for found in seen]).tolist() == [sample.label for sample in wanted]


def test_one_changed_byte_anywhere_is_found(tmp_path: Path, random_samples, write_set) -> None:
    manifest = write_set(str(tmp_path), random_samples(25))
    path = tmp_path / "train-000001.tar"
    whole = path.read_bytes()
    for place in (0, 600, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = list(examined(str(tmp_path), manifest, None))
        assert [bool(seen.problems) for seen in found] == [False, True, False]
        assert f"{path} is damaged" in found[1].problems[0]
    path.unlink()
    assert str(path) in list(examined(str(tmp_path), manifest, None))[1].problems[0]


@pytest.mark.parametrize("encoding", ["png", "webp"])
def test_every_image_that_cannot_be_decoded_is_named(tmp_path: Path, random_samples, encoding: str) -> None:
    """Whole bytes are not enough: these shards are as the manifest says, but some images in them are none."""
    split = write_split(str(tmp_path), "train", random_samples(25), samples_per_shard=10, encoding=encoding)
    bad = {0: (2, 7), 2: (4,)}
    shards = list(split.shards)
    for number, places in bad.items():
        shard = shards[number]
        raw = bytearray((tmp_path / shard.path).read_bytes())
        for place in places:
            at = int(shard.offsets[place])
            raw[at : at + 30] = bytes(30)
        (tmp_path / shard.path).write_bytes(raw)
        shards[number] = replace(shard, sha256=hashlib.sha256(raw).hexdigest())
    manifest = Manifest(
        name="bad",
        resolution=6,
        channels=3,
        class_names=("a", "b", "c", "d"),
        flip=False,
        splits={"train": replace(split, shards=tuple(shards))},
    )
    assert [found.problems for found in examined(str(tmp_path), manifest, None)] == [()] * 3
    found = list(examined(str(tmp_path), manifest, 0))
    named = [[problem.partition(": not a readable")[0] for problem in each.problems] for each in found]
    assert named == [
        [f"{tmp_path}/train-{number:06d}.tar: sample s{10 * number + place:04d}" for place in bad.get(number, ())]
        for number in range(3)
    ]
    with pytest.raises(DataError, match=rf"2 shards of {tmp_path} .*\n(.*sample.*\n){{3}}Copy .* or make the set anew"):
        require_sound(str(tmp_path), manifest, found)


def test_of_many_problems_the_first_ten_are_named(tmp_path: Path, random_samples, write_set) -> None:
    manifest = write_set(str(tmp_path), random_samples(30), samples_per_shard=2)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match="15 shards of ") as caught:
        require_sound(str(tmp_path), manifest, list(examined(str(tmp_path), manifest, None)))
    assert str(caught.value).count("\n  cannot read") == 10 and "and 5 more" in str(caught.value)


def test_a_contact_sheet_reads_like_a_page() -> None:
    images = [np.full((3, 2, 2), number, np.uint8) for number in range(1, 6)]
    sheet = contact_sheet(images, columns=3)
    assert sheet.shape == (4, 6, 3)
    assert sheet[::2, ::2, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert contact_sheet([image[:1] for image in images], columns=2).shape == (6, 4)
