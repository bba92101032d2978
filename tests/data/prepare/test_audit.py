"""Every byte is compared, every image counted, and a contact sheet shows them in order."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.manifest import Manifest
from data.prepare.audit import contact_sheet, examined
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


def test_a_contact_sheet_reads_like_a_page() -> None:
    images = [np.full((3, 2, 2), number, np.uint8) for number in range(1, 6)]
    sheet = contact_sheet(images, columns=3)
    assert sheet.shape == (4, 6, 3)
    assert sheet[::2, ::2, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert contact_sheet([image[:1] for image in images], columns=2).shape == (6, 4)
