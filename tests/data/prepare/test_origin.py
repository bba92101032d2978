"""A finished set knows what it was made of and how: the same command on anything else says so and stops."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import store
from data.errors import DataError
from data.manifest import check_shards, load_manifest
from data.prepare import Choices, prepare

CHOICES = Choices(resolution=8, samples_per_shard=4)


def png(seed: int, side: int = 8) -> bytes:
    """Of the same size for all seeds, as nothing in it is compressed."""
    buffer = io.BytesIO()
    image = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(image).save(buffer, format="PNG", compress_level=0)
    return buffer.getvalue()


def in_folder(place: str, content: Mapping[str, bytes]) -> str:
    for name, payload in content.items():
        if not store.exists(store.join(place, name)) or store.read_bytes(store.join(place, name)) != payload:
            store.write_bytes(store.join(place, name), payload)
    for name in set(store.walk(place)) - set(content):
        store.remove(store.join(place, name))
    return place


def in_zip(place: str, content: Mapping[str, bytes]) -> str:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, payload in content.items():
            archive.writestr(name, payload)
    store.write_bytes(place + ".zip", buffer.getvalue())
    return place + ".zip"


def in_tars(place: str, content: Mapping[str, bytes]) -> str:
    tars: dict[str, bytes] = {}
    for name, payload in content.items():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
        tars[f"{name.partition('.')[0]}.tar"] = buffer.getvalue()
    return in_folder(place, tars)


CONTAINERS: dict[str, tuple[Callable[[str, Mapping[str, bytes]], str], Choices]] = {
    "folder": (in_folder, CHOICES),
    "zip": (in_zip, CHOICES),
    "tars": (in_tars, Choices()),
    "rewritten": (in_tars, replace(CHOICES, rewrite=True)),
}
CHANGES: dict[str, tuple[Callable[[dict[str, bytes]], Any], str]] = {
    "replaced": (lambda files: files.update({"03.png": png(99)}), "files of its source were replaced or changed"),
    "repaired": (lambda files: files.update({"03.png": png(3, side=60)}), "files? of .* bytes, and now has"),
    "added": (lambda files: files.update({"10.png": png(10)}), "its source had 10 files of .* and now has 11"),
    "removed": (lambda files: files.pop("09.png"), "its source had 10 files of .* and now has 9"),
    "renamed": (lambda files: files.update({"a.png": files.pop("09.png")}), "10 files of its source have other names"),
}


@pytest.mark.parametrize(
    ("where", "container", "change"),
    [
        *(("local", container, change) for container in CONTAINERS for change in CHANGES),
        *(("s3", container, "replaced") for container in CONTAINERS),
    ],
)
def test_a_changed_source_is_told_and_made_anew_on_request(
    tmp_path: Path, request: pytest.FixtureRequest, where: str, container: str, change: str
) -> None:
    place = str(tmp_path / "in") if where == "local" else request.getfixturevalue("bucket") + "/in"
    put, choices = CONTAINERS[container]
    content = {f"{number:02d}.png": png(number) for number in range(10)}
    source, to = put(place, content), str(tmp_path / "set")
    first = prepare("mine", source, to, choices=choices)
    assert prepare("mine", source, to, choices=choices) == first
    edit, message = CHANGES[change]
    edit(content)
    if container == "tars" and change == "repaired":
        return  # images of two sizes are refused before
    put(place, content)
    with pytest.raises(DataError, match=f"{to} holds a finished set, but .*{message}.*add --again"):
        prepare("mine", source, to, choices=choices)
    again = prepare("mine", source, to, choices=replace(choices, again=True))
    check_shards(to, again)
    assert load_manifest(to) == again == prepare("mine", source, str(tmp_path / "fresh"), choices=choices)
    assert (again.sha256 == first.sha256) == (change == "renamed" and container != "tars")
    assert prepare("mine", source, to, choices=choices) == again


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"held_out": 2}, "--held-out left out, not 2"),
        ({"encoding": "png"}, "--encoding raw, not png"),
        ({"samples_per_shard": 5}, "--samples-per-shard 4, not 5"),
        ({"flip": True}, "--flip left out, not given"),
        ({"channels": 1}, "--channels 3, not 1"),
        ({"resolution": 7}, "--resolution 8, not 7"),
        ({"fit": "pad"}, "--fit crop, not pad"),
        ({"filter": "lanczos"}, "--filter area, not lanczos"),
        ({"background": "white"}, "--background black, not white"),
        ({"small": "enlarge"}, "--small refuse, not enlarge"),
        ({"skip_bad": "2"}, "--skip-bad left out, not 2"),
    ],
)
def test_other_options_are_another_set(tmp_path: Path, option: dict[str, Any], said: str) -> None:
    source = in_folder(str(tmp_path / "in"), {f"{number:02d}.png": png(number) for number in range(10)})
    first = prepare("mine", source, str(tmp_path / "set"), choices=CHOICES)
    with pytest.raises(DataError, match=f"it was made with {said}. Choose another URL, or add --again"):
        prepare("mine", source, str(tmp_path / "set"), choices=replace(CHOICES, **option))
    assert load_manifest(str(tmp_path / "set")) == first
    # What is said although it is usual changes nothing.
    same = replace(CHOICES, encoding="raw", channels=3)
    assert prepare("mine", source, str(tmp_path / "set"), choices=same) == first


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"resolution": 16}, "its resolution is 8, not 16"),
        ({"channels": 1}, "its channels is 3, not 1"),
        ({"flip": True}, "made with --flip left out, not given"),
        ({"rewrite": True, "resolution": 8}, "made with --resolution left out, not 8"),
    ],
)
def test_other_options_are_another_set_for_tars_that_stay_too(
    tmp_path: Path, option: dict[str, Any], said: str
) -> None:
    source = in_tars(str(tmp_path / "in"), {f"{number:02d}.png": png(number) for number in range(3)})
    first = prepare("mine", source, str(tmp_path / "set"))
    assert prepare("mine", source, str(tmp_path / "set"), choices=Choices(resolution=8, channels=3)) == first
    with pytest.raises(DataError, match=said):
        prepare("mine", source, str(tmp_path / "set"), choices=Choices(**option))


def test_a_smaller_set_made_again_leaves_no_shard_behind(tmp_path: Path) -> None:
    content = {f"{number:02d}.png": png(number) for number in range(30)}
    prepare("mine", in_folder(str(tmp_path / "in"), content), str(tmp_path / "set"), choices=CHOICES)
    (tmp_path / "set" / "train-000099.tar").write_bytes(b"not ours")
    source = in_folder(str(tmp_path / "in"), dict(list(content.items())[:5]))
    prepare("mine", source, str(tmp_path / "set"), choices=replace(CHOICES, again=True))
    names = [path.name for path in sorted((tmp_path / "set").iterdir())]
    assert names == ["manifest.json", "train-000000.tar", "train-000001.tar", "train-000099.tar"]


def test_tars_that_were_only_described_are_never_removed(tmp_path: Path) -> None:
    files = {f"train-{number:06d}.png": png(number) for number in range(5)}
    source = in_tars(str(tmp_path / "in"), files)
    prepare("mine", source, source)
    (tmp_path / "in" / "train-000004.tar").rename(tmp_path / "last.tar")
    prepare("mine", source, source, choices=Choices(again=True))
    assert len(list((tmp_path / "in").glob("*.tar"))) == 4


def test_no_two_names_share_a_place_even_again(tmp_path: Path) -> None:
    source = in_folder(str(tmp_path / "in"), {"0.png": png(0)})
    prepare("mine", source, str(tmp_path / "set"), choices=CHOICES)
    with pytest.raises(DataError, match="holds a different data set: its name is 'mine', not 'yours'"):
        prepare("yours", source, str(tmp_path / "set"), choices=replace(CHOICES, again=True))


def test_a_set_from_before_counts_as_whole(tmp_path: Path) -> None:
    source, to = in_folder(str(tmp_path / "in"), {"0.png": png(0), "1.png": png(1)}), tmp_path / "set"
    first = prepare("mine", source, str(to), choices=CHOICES)
    value = json.loads((to / "manifest.json").read_text())
    del value["made"]
    (to / "manifest.json").write_text(json.dumps(value))
    times = {path: path.stat().st_mtime_ns for path in to.iterdir()}
    found = prepare("mine", source, str(to), choices=CHOICES)
    assert found == first and found.made is None and found.sha256 == first.sha256
    assert {path: path.stat().st_mtime_ns for path in to.iterdir()} == times


def test_an_option_that_came_later_counts_as_its_default(tmp_path: Path) -> None:
    source, to = in_folder(str(tmp_path / "in"), {"0.png": png(0)}), tmp_path / "set"
    prepare("mine", source, str(to), choices=CHOICES)
    value = json.loads((to / "manifest.json").read_text())
    del value["made"]["options"]["background"]
    (to / "manifest.json").write_text(json.dumps(value))
    assert prepare("mine", source, str(to), choices=CHOICES).made is not None
    with pytest.raises(DataError, match="--background black, not white"):
        prepare("mine", source, str(to), choices=replace(CHOICES, background="white"))


@pytest.mark.parametrize("container", ["folder", "zip", "rewritten"])
def test_an_image_replaced_after_a_kill_is_written_anew(tmp_path: Path, container: str) -> None:
    put, choices = CONTAINERS[container]
    content = {f"{number:02d}.png": png(number) for number in range(10)} | {"09.png": png(9)[:-60]}
    with pytest.raises(DataError, match="1 images of the source cannot be used"):
        prepare("mine", put(str(tmp_path / "in"), content), str(tmp_path / "set"), choices=choices)
    content |= {"09.png": png(9), "01.png": png(77)}
    source = put(str(tmp_path / "in"), content)
    manifest = prepare("mine", source, str(tmp_path / "set"), choices=choices)
    assert manifest == prepare("mine", source, str(tmp_path / "fresh"), choices=choices)


def test_a_copy_with_the_same_times_is_the_same_source(tmp_path: Path) -> None:
    source = in_folder(str(tmp_path / "in"), {f"{number}.png": png(number) for number in range(3)})
    first = prepare("mine", source, str(tmp_path / "set"), choices=CHOICES)
    (tmp_path / "copy").mkdir()
    for path in (tmp_path / "in").iterdir():
        copy = tmp_path / "copy" / path.name
        copy.write_bytes(path.read_bytes())
        os.utime(copy, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    assert prepare("mine", str(tmp_path / "copy"), str(tmp_path / "set"), choices=CHOICES) == first


FILES_ONLY: dict[str, Any] = {
    "fit": "pad",
    "filter": "lanczos",
    "background": "white",
    "small": "enlarge",
    "skip_bad": "1%",
}


@pytest.mark.parametrize(
    ("container", "options"),
    [
        ("tars", FILES_ONLY | {"held_out": 1, "encoding": "png", "samples_per_shard": 5}),
        ("folder", {"rewrite": True}),
        ("zip", {"rewrite": True}),
        ("marked", {"held_out": 1}),
        ("digits", FILES_ONLY | {"held_out": 1, "rewrite": True}),
    ],
)
def test_an_option_without_effect_is_an_error(tmp_path: Path, container: str, options: dict[str, Any]) -> None:
    content = {f"{number:02d}.png": png(number) for number in range(10)}
    name, source, choices = "mine", None, Choices()
    if container == "digits":
        name = "digits"
    elif container == "marked":
        source = in_folder(str(tmp_path / "in"), {f"{split}/0.png": png(0) for split in ("train", "val")})
        choices = CHOICES
    else:
        put, choices = CONTAINERS[container]
        source = put(str(tmp_path / "in"), content)
    for option, value in options.items():
        with pytest.raises(DataError, match=f"--{option.replace('_', '-')} has no effect on .*: leave it out"):
            prepare(name, source, str(tmp_path / "set"), choices=replace(choices, **{option: value}))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "edm-ffhq64", "filter": "lanczos"}, "--filter has no effect with --fit edm-ffhq64"),
        ({"fit": "none", "small": "enlarge"}, "--filter and --small have no effect with --fit none"),
        ({"fit": "fill"}, "'fill' is unknown; choose from crop, pad, stretch, none, edm-imagenet64"),
        ({"filter": "box"}, "'box' is unknown; choose from area, lanczos, bicubic"),
        ({"background": "blackish"}, "background 'blackish' is no colour: give a name or #rrggbb"),
    ],
)
def test_options_that_contradict_each_other(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = in_folder(str(tmp_path / "in"), {"0.png": png(0)})
    with pytest.raises(DataError, match=message):
        prepare("mine", source, str(tmp_path / "set"), choices=replace(CHOICES, resolution=64, **options))
