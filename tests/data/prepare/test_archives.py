"""Archives, links and tars as they lie: what could be lost is read, named or refused."""

import io
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from containers import CONTAINERS, in_folder, in_packed, in_tar, in_zip, pixels, png, read, tar_of

from data import store
from data.errors import DataError
from data.prepare import Choices, prepare
from data.prepare.files import contents
from data.prepare.source import look_at, opened
from data.prepare.write import in_turn

CHOICES = Choices(resolution=6, held_out=0, samples_per_shard=4)


def prepared(tmp_path: Path, source: str, **options: Any) -> tuple[dict[str, list[tuple[bytes, str]]], list[str]]:
    told: list[str] = []
    choices = Choices(**CHOICES.__dict__ | options)
    manifest = prepare("mine", source, str(tmp_path / "set"), choices=choices, tell=told.append)
    return read(str(tmp_path / "set"), manifest, tmp_path / "cache"), told


def test_images_and_archives_in_one_folder_are_refused(tmp_path: Path) -> None:
    source = in_folder(tmp_path / "in", {"a.png": png(0), "deep/backup.tar": tar_of({"a.png": png(0)})})
    with pytest.raises(DataError, match=r"1 images \(such as a\.png\) and 1 archives \(such as deep/backup\.tar\)"):
        prepared(tmp_path, source)


def test_archives_of_several_kinds_make_one_set(tmp_path: Path) -> None:
    source = in_folder(tmp_path / "in", {"train-0.tar": tar_of({"a.png": png(0), "b.png": png(1)})})
    in_packed(tmp_path / "in", {"a.png": png(2)}, name="train-1.tar.gz")
    in_packed(tmp_path / "in", {"a.png": png(3)}, "zstd", "train-2.tar.zst")
    Path(in_zip(tmp_path / "in", {"a.png": png(4)})).rename(tmp_path / "in" / "val-0.zip")
    with pytest.raises(DataError, match="are written anew, as they are not in plain tars alone: give --resolution"):
        prepared(tmp_path, source, resolution=None)
    found, _ = prepared(tmp_path, source, held_out=None)
    assert {split: [pixel for pixel, _ in images] for split, images in found.items()} == {
        "train": [pixels(seed).tobytes() for seed in range(4)],
        "test": [pixels(4).tobytes()],
    }


@pytest.mark.parametrize(("name", "codec"), [("a.tgz", "gzip"), ("a.tar.zst", "zstd"), ("a.tar.bz2", "bz2")])
def test_a_compressed_tar_that_is_cut_is_never_a_shorter_set(tmp_path: Path, name: str, codec: str) -> None:
    source = Path(in_packed(tmp_path / "in", {f"{n}.png": png(n) for n in range(30)}, codec, name))
    whole = source.read_bytes()
    for kept in (0, 1, len(whole) // 2, len(whole) - 9):
        source.write_bytes(whole[:kept])
        with pytest.raises(DataError, match=f"{name} is not a whole|{name} is cut off"):
            prepared(tmp_path, str(source))
    source.write_bytes(whole)
    assert len(prepared(tmp_path, str(source))[0]["train"]) == 30


def test_links_are_followed_and_those_that_cannot_be_are_named(tmp_path: Path) -> None:
    in_folder(tmp_path / "elsewhere", {"1.png": png(0)})
    source = tmp_path / "in"
    in_folder(source, {"cat/1.png": png(1)})
    (source / "dog").symlink_to(tmp_path / "elsewhere")
    (source / "dog2").mkdir()
    (source / "dog2" / "1.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert sorted(label for _, label in prepared(tmp_path, str(source))[0]["train"]) == ["cat", "dog", "dog2"]
    (source / "loop").symlink_to(source)
    with pytest.raises(DataError, match="loop is a link to a folder that it lies in"):
        prepared(tmp_path, str(source))
    (source / "loop").unlink()
    (source / "cat" / "2.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"cat/2\.png lead nowhere"):
        prepared(tmp_path, str(source))


@pytest.mark.parametrize("container", ["folder", "tar"])
def test_a_set_is_never_written_into_its_own_source(tmp_path: Path, container: str) -> None:
    source = Path(CONTAINERS[container](tmp_path / "in", {"a.png": png(0), "b.png": png(1), "readme": b"x"}))
    (source / "more.txt").write_bytes(b"x")
    for place in (source, source / "deep" / "set"):
        with pytest.raises(DataError, match="of which it would become a part: write elsewhere"):
            prepare("mine", str(source), str(place), choices=Choices(resolution=6, rewrite=container == "tar"))
    # Beside a file that is the source itself there is room.
    one = Path(in_packed(tmp_path / "one", {"a.png": png(0)}))
    prepare("mine", str(one), str(one.parent / "set"), choices=Choices(resolution=6))
    assert sorted(path.name for path in source.rglob("*.tar")) == (["set.tar"] if container == "tar" else [])


@pytest.mark.parametrize("container", ["zip", "tar"])
def test_two_members_of_one_name_are_never_one(tmp_path: Path, container: str) -> None:
    (tmp_path / "in").mkdir()
    for seed in (0, 1):
        if container == "zip":
            with zipfile.ZipFile(tmp_path / "in" / "set.zip", "a") as archive:
                archive.writestr("a.png", png(seed))
        else:
            with tarfile.open(tmp_path / "in" / "set.tar", "a") as archive:
                member = tarfile.TarInfo("a.png")
                member.size = len(png(seed))
                archive.addfile(member, io.BytesIO(png(seed)))
    source = str(tmp_path / "in" / f"set.{container}")
    with pytest.raises(DataError, match=r"holds two files called a\.png"):
        prepared(tmp_path, source, rewrite=container == "tar")


AS_THEY_LIE: Mapping[str, tuple[Mapping[str, bytes], str]] = {
    "keys with dots": ({"22.01.png": png(0), "22.02.png": png(1)}, "22.01.png, 22.02.png would be lost"),
    "a mask beside": ({"a.png": png(0), "a.seg.png": png(1)}, "a.seg.png would be lost"),
    "class folders": ({"cat/1.png": png(0), "dog/2.png": png(1)}, "label does not come from its own"),
    "splits": ({"train/1.png": png(0), "val/2.png": png(1)}, "holds images of the splits train, test"),
    "names as labels": ({"1.png": png(0), "1.json": b'{"label": "cat"}'}, "label 'cat' is not a whole number"),
    "a kind that stock readers lack": ({"1.png": png(0), "2.gif": png(1)}, "2.gif would be lost"),
    "a hidden image": ({"1.png": png(0), ".old/2.png": png(1)}, ".old/2.png would be lost"),
}


@pytest.mark.parametrize("name", AS_THEY_LIE)
def test_tars_that_would_lose_something_as_they_lie_are_to_be_rewritten(tmp_path: Path, name: str) -> None:
    files, message = AS_THEY_LIE[name]
    source = in_tar(tmp_path / "in", files)
    with pytest.raises(DataError, match=f"{message}.*add --rewrite --resolution N"):
        prepare("mine", source, str(tmp_path / "set"))
    found, _ = prepared(tmp_path, source, rewrite=True, held_out=None)
    used = sum(map(len, found.values()))
    assert used == sum(not name.endswith(".json") and not name.startswith(".") for name in files)


def test_one_of_two_sources_of_labels_is_chosen_for_tars_as_they_lie(tmp_path: Path) -> None:
    files = {
        f"{name}/{key}.{end}": data
        for name, key, label in (("cat", "1", b"1"), ("dog", "2", b"0"))
        for end, data in (("png", png(int(key))), ("cls", label))
    }
    source = in_tar(tmp_path / "in", files)
    with pytest.raises(DataError, match=r"labels in \.cls and folder: choose with --labels \.cls or --labels folder"):
        prepare("mine", source, str(tmp_path / "set"))
    manifest = prepare("mine", source, str(tmp_path / "set"), choices=Choices(labels=".cls"))
    assert [label for _, label in read(str(tmp_path / "set"), manifest, tmp_path / "cache")["train"]] == ["1", "0"]


def test_a_known_set_has_no_more_classes_than_it_has(tmp_path: Path) -> None:
    files = {"a.png": png(0, side=64), "b.png": png(1, side=64), "a.cls": b"0", "b.cls": b"3"}
    with pytest.raises(DataError, match=r"there is the label 3 in \.cls, but the set has 1 classes"):
        prepare("ffhq64", in_folder(tmp_path / "in", files), str(tmp_path / "set"))
    (tmp_path / "in" / "b.cls").write_bytes(b"1000")
    with pytest.raises(DataError, match=r"there is the label 1000 in \.cls, but the set has 1,000 classes"):
        prepare("imagenet64", str(tmp_path / "in"), str(tmp_path / "set"))


def test_images_are_held_out_only_where_their_class_stays(tmp_path: Path) -> None:
    files = {f"{number // 2}/{number}.png": png(number) for number in range(20)}
    found, _ = prepared(tmp_path, in_folder(tmp_path / "in", files), held_out=10)
    assert {label for _, label in found["train"]} == set("0123456789") and len(found["test"]) == 10
    with pytest.raises(DataError, match="as no class may lose its last: give at most 10"):
        prepared(tmp_path / "again", str(tmp_path / "in"), held_out=11)


def test_a_class_whose_name_is_no_text_is_named(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"the"):
        folder = os.fsencode(tmp_path / "in") + b"/" + name
        os.makedirs(folder)
        with open(folder + b"/1.png", "wb") as file:
            file.write(png(0))
    with pytest.raises(DataError, match=r"'caf\\udce9' cannot be the name of a class"):
        prepared(tmp_path, str(tmp_path / "in"))


@pytest.mark.parametrize("container", ["folder", "zip", "tar", "tgz", "two"])
def test_a_source_on_a_server_makes_the_same_set(tmp_path: Path, bucket: str, container: str) -> None:
    files = {f"{name}/{seed}.png": png(seed) for seed, name in enumerate(("cat", "dog") * 6)}
    files["metadata.csv"] = b"file_name,label\n" + b"".join(f"{name},{name[:3]}\n".encode() for name in files)
    source = Path(CONTAINERS[container](tmp_path / "in", files))
    for path in source.rglob("*") if source.is_dir() else [source]:
        if path.is_file():
            store.write_bytes(f"{bucket}/in/{path.relative_to(tmp_path / 'in')}", path.read_bytes())
    there = f"{bucket}/in" if source.is_dir() else f"{bucket}/in/{source.name}"
    choices = Choices(resolution=6, samples_per_shard=5, rewrite=container == "tar")
    sets = [
        prepare("mine", url, str(tmp_path / f"set{n}"), choices=choices) for n, url in enumerate((str(source), there))
    ]
    assert sets[0] == sets[1] and sets[0].class_names == ("cat", "dog")


def test_a_tar_that_changes_after_it_was_listed_is_noticed(tmp_path: Path) -> None:
    source = in_tar(tmp_path / "in", {"a.png": png(0), "b.png": png(1)})
    with opened(look_at("mine", source), None, in_turn) as listed:
        (tmp_path / "in" / "set.tar").write_bytes(tar_of({"c.txt": b"x" * 700, "a.png": png(0), "b.png": png(1)}))
        with pytest.raises(DataError, match=r"set\.tar/a\.png has changed since it was listed"):
            list(contents(source, listed.places, listed.files))


def test_archives_named_after_classes_are_no_classes_and_the_user_is_told(tmp_path: Path) -> None:
    source = in_folder(
        tmp_path / "in", {f"{name}-0.tar": tar_of({"1.png": png(0)}) for name in ("cat", "dog", "train")}
    )
    found, told = prepared(tmp_path, source, rewrite=True)
    assert [label for _, label in found["train"]] == ["all"] * 3
    assert "note: the names of the archives (cat-, dog-) are taken for no classes" in told
