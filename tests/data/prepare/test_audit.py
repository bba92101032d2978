"""Every byte is compared, every image counted, and a contact sheet shows them in order."""

from pathlib import Path

import numpy as np

from data.prepare.audit import contact_sheet, looks, see, without_shards


def test_a_sound_set_is_counted_and_sampled(tmp_path: Path, random_samples, write_set) -> None:
    samples = random_samples(25)
    manifest = write_set(str(tmp_path), samples)
    facts = without_shards(manifest)
    assert len(facts.to_json()) < len(manifest.to_json())
    seen = [found for look in looks(manifest, 6) for found in see(look, url=str(tmp_path), facts=facts, decode=True)]
    assert [found.problem for found in seen] == [""] * 3
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
        found = [
            seen for look in looks(manifest, 0) for seen in see(look, url=str(tmp_path), facts=manifest, decode=False)
        ]
        assert [bool(seen.problem) for seen in found] == [False, True, False]
        assert f"{path} is damaged" in found[1].problem
    path.unlink()
    (seen,) = see(looks(manifest, 0)[1], url=str(tmp_path), facts=manifest, decode=False)
    assert str(path) in seen.problem


def test_a_contact_sheet_reads_like_a_page() -> None:
    images = [np.full((3, 2, 2), number, np.uint8) for number in range(1, 6)]
    sheet = contact_sheet(images, columns=3)
    assert sheet.shape == (4, 6, 3)
    assert sheet[::2, ::2, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert contact_sheet([image[:1] for image in images], columns=2).shape == (6, 4)
