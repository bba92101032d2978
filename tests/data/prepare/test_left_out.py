"""Images that cannot be used are left out up to a stated limit, and listed."""

import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made import cached_split
from PIL import Image

from data.errors import DataError
from data.manifest import load_manifest
from data.prepare import Choices, prepare
from data.prepare.write import LEFT_OUT, most_left_out

CHOICES = Choices(resolution=8, samples_per_shard=4, held_out=0)
BAD = ("02.png", "03.png", "07.png", "12.png", "13.png", "14.png", "15.png")


def image(seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(seed: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image(seed, side)).save(buffer, format="PNG")
    return buffer.getvalue()


CONTENT = {f"{number:02d}.png": png(number) for number in range(30)} | {
    "02.png": b"",
    "03.png": png(3)[:80],
    "07.png": png(7, side=7),
    **dict.fromkeys(BAD[3:], b"<html>404</html>"),
}


def in_folder(place: Path, content: Mapping[str, bytes]) -> str:
    place.mkdir()
    for name, payload in content.items():
        (place / name).write_bytes(payload)
    return str(place)


def in_zip(place: Path, content: Mapping[str, bytes]) -> str:
    place = place.with_suffix(".zip")
    with zipfile.ZipFile(place, "w") as archive:
        for name, payload in content.items():
            archive.writestr(name, payload)
    return str(place)


def in_tar(place: Path, content: Mapping[str, bytes]) -> str:
    place.mkdir()
    with tarfile.open(place / "a.tar", "w") as archive:
        for name, payload in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    return str(place)


CONTAINERS: dict[str, tuple[Callable[[Path, Mapping[str, bytes]], str], Choices]] = {
    "folder": (in_folder, CHOICES),
    "zip": (in_zip, CHOICES),
    # What is no image at all is told when tars are listed.
    "tar": (in_tar, replace(CHOICES, rewrite=True)),
}


@pytest.mark.parametrize("limit", ["7", "24%"])
@pytest.mark.parametrize("container", ["folder", "zip"])
def test_up_to_the_limit_they_are_left_out_and_listed(tmp_path: Path, container: str, limit: str) -> None:
    put, choices = CONTAINERS[container]
    source, to, told = put(tmp_path / "in", CONTENT), tmp_path / "set", list[str]()
    skipping = replace(choices, skip_bad=limit)
    manifest = prepare("mine", source, str(to), choices=skipping, tell=told.append)
    good = [number for number in range(30) if f"{number:02d}.png" not in BAD]
    # A shard of which nothing is left is not there.
    assert [shard.path for shard in manifest.split("train").shards] == [
        f"train-{number:06d}.tar" for number in range(8) if number != 3
    ]
    cached = cached_split(str(to), manifest, "train", tmp_path / "cache")
    assert np.array_equal(cached.images, np.stack([image(number).transpose(2, 0, 1) for number in good]))
    listed = (to / LEFT_OUT).read_text().splitlines()
    assert [line.partition(".png")[0][-2:] + ".png" for line in listed] == list(BAD)
    assert "has 0 bytes" in listed[0] and "no readable image" in listed[1] and "7x7 pixels are fewer" in listed[2]
    assert told[1:] == [f"note: 7 images are left out, as {to}/{LEFT_OUT} lists, for example {listed[0]}"]
    assert manifest.made is not None and manifest.made.left_out == {"train": 7}
    assert prepare("mine", source, str(to), choices=skipping) == manifest
    with pytest.raises(DataError, match=f"made with --skip-bad {limit}, not left out"):
        prepare("mine", source, str(to), choices=choices)


@pytest.mark.parametrize("limit", [None, "6", "23%"])
@pytest.mark.parametrize("container", ["folder", "zip"])
def test_beyond_the_limit_all_are_named_in_one_error(tmp_path: Path, container: str, limit: str | None) -> None:
    put, choices = CONTAINERS[container]
    source, to = put(tmp_path / "in", CONTENT), tmp_path / "set"
    with pytest.raises(DataError, match="7 images of the source cannot be used") as caught:
        prepare("mine", source, str(to), choices=replace(choices, skip_bad=limit))
    assert all(name in str(caught.value) for name in BAD)
    assert "--skip-bad 7" in str(caught.value) and "--small enlarge" in str(caught.value)
    assert not (to / "manifest.json").exists() and not (to / LEFT_OUT).exists()
    # What was written with fewer images counts only where they may be left out.
    again = prepare("mine", source, str(to), choices=replace(choices, skip_bad="7"))
    assert again == prepare("mine", source, str(tmp_path / "fresh"), choices=replace(choices, skip_bad="7"))


def test_once_they_are_repaired_no_trace_is_left(tmp_path: Path) -> None:
    source, to = in_folder(tmp_path / "in", CONTENT), tmp_path / "set"
    prepare("mine", source, str(to), choices=replace(CHOICES, skip_bad="50%"))
    for name in BAD:
        (tmp_path / "in" / name).write_bytes(png(int(name[:2])))
    manifest = prepare("mine", source, str(to), choices=replace(CHOICES, again=True))
    assert manifest == prepare("mine", source, str(tmp_path / "fresh"), choices=CHOICES) == load_manifest(str(to))
    assert manifest.split("train").count == 30
    assert {path.name for path in to.iterdir()} == {path.name for path in (tmp_path / "fresh").iterdir()}


@pytest.mark.parametrize("container", CONTAINERS)
def test_images_that_are_cut_off_are_left_out_of_every_kind_of_source(tmp_path: Path, container: str) -> None:
    put, choices = CONTAINERS[container]
    content = {f"{number:02d}.png": png(number) for number in range(10)}
    content["04.png"] = content["04.png"][:-60]
    source = put(tmp_path / "in", content)
    with pytest.raises(DataError, match="1 images of the source cannot be used"):
        prepare("mine", source, str(tmp_path / "set"), choices=choices)
    manifest = prepare("mine", source, str(tmp_path / "set"), choices=replace(choices, skip_bad="1"))
    assert manifest.split("train").count == 9
    assert "04" in (tmp_path / "set" / LEFT_OUT).read_text()


def test_a_member_that_a_zip_lost_is_one_bad_image(tmp_path: Path) -> None:
    content = {f"{number:02d}.png": png(number) for number in range(10)}
    source = Path(in_zip(tmp_path / "a.zip", content))
    whole = source.read_bytes()
    at = whole.index(content["04.png"]) + 60
    source.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    manifest = prepare("mine", str(source), str(tmp_path / "set"), choices=replace(CHOICES, skip_bad="10%"))
    assert manifest.split("train").count == 9
    assert "04.png cannot be read (Bad CRC-32" in (tmp_path / "set" / LEFT_OUT).read_text()


def test_what_was_done_with_images_of_an_earlier_run_is_told_too(tmp_path: Path) -> None:
    clear = io.BytesIO()
    Image.fromarray(np.dstack([image(0), image(1)[..., 0]])).save(clear, format="PNG")
    content = {f"{number:02d}.png": png(number) for number in range(10)} | {"00.png": clear.getvalue(), "09.png": b"x"}
    source, told = in_folder(tmp_path / "in", content), list[str]()
    with pytest.raises(DataError, match="1 images of the source cannot be used"):
        prepare("mine", source, str(tmp_path / "set"), choices=CHOICES, tell=told.append)
    kept = (tmp_path / "set" / "train-000000.tar").stat().st_mtime_ns
    (tmp_path / "in" / "09.png").write_bytes(png(9))
    prepare("mine", source, str(tmp_path / "set"), choices=CHOICES, tell=told.append)
    assert (tmp_path / "set" / "train-000000.tar").stat().st_mtime_ns == kept
    assert [line for line in told if line.startswith("note")] == [
        f"note: 1 images have transparent parts, which are laid over the background, for example {source}/00.png"
    ]


def test_a_set_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    source = in_folder(tmp_path / "in", {"0.png": b"x", "1.png": b"y"})
    with pytest.raises(DataError, match="no image of the split train can be used"):
        prepare("mine", source, str(tmp_path / "set"), choices=replace(CHOICES, skip_bad="100%"))


def test_limits_are_numbers_or_shares() -> None:
    assert [most_left_out(text, 1000) for text in (None, "0", "12", "1%", "0.25%", "100%")] == [0, 0, 12, 10, 2, 1000]
    for wrong in ("", "-1", "1.5", "101%", "%", "many", "1 %"):
        with pytest.raises(DataError, match="neither a number of images"):
            Choices(skip_bad=wrong)
