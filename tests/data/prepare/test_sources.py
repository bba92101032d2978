"""Nothing of a source is left out in silence, and no label is guessed: each kind of case in each kind of container."""

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from containers import CONTAINERS, REWRITTEN, pixels, png, read

from data.errors import DataError
from data.prepare import Choices, prepare

CHOICES = Choices(resolution=6, held_out=0, samples_per_shard=4)


@dataclass(frozen=True)
class Case:
    """A source, and what it must become.

    Attributes:
        images: Seed of each image by its path.
        others: All other files.
        wanted: For each split the class of each seed; or the message with which it is refused.
        told: What the notes must say.
        options: What the user says.
    """

    images: Mapping[str, int]
    wanted: Mapping[str, Mapping[int, str]] | str
    others: Mapping[str, bytes] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def numbered(*names: str) -> dict[str, int]:
    return {name: seed for seed, name in enumerate(names)}


def text(value: object) -> bytes:
    return json.dumps(value).encode()


FLAT = numbered("a.png", "b.png", "c.png", "d.png")
PETS = numbered("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
BY_FOLDER = {"train": {0: "cat", 1: "cat", 2: "dog", 3: "dog"}}
NUMBERS = {"train": {0: "0", 1: "1", 2: "1", 3: "2"}}
SPLIT = numbered("train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/4.png")
BY_SPLIT = {"train": {0: "cat", 1: "dog"}, "test": {2: "cat", 3: "dog"}}
ALL = {"train": dict.fromkeys(range(4), "all")}
EDM = numbered("00000/img00000000.png", "00000/img00000001.png", "00001/img00000002.png", "00001/img00000003.png")
EDM_LABELS = {"dataset.json": text({"labels": [[name, label] for name, label in zip(EDM, (0, 1, 1, 2), strict=True)]})}
TINY = numbered("train/n1/images/n1_0.png", "train/n2/images/n2_0.png", "val/images/val_0.png", "val/images/val_1.png")
CAFE = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
ROWS = b"file_name,label\na.png,cat\nb.png,cat\nc.png,dog\nd.png,dog\n"

CASES: Mapping[str, Case] = {
    "class folders": Case(PETS, BY_FOLDER),
    "splits of class folders": Case({f"set/{name}": seed for name, seed in SPLIT.items()}, BY_SPLIT),
    "splits in class folders": Case(
        numbered("cat/train/1.png", "dog/train/2.png", "cat/val/3.png", "dog/val/4.png"), BY_SPLIT
    ),
    "splits with more in their names": Case(
        numbered("pets_train/cat/1.png", "pets_train/dog/2.png", "pets_val/cat/3.png", "pets_val/dog/4.png"), BY_SPLIT
    ),
    "a split's name in a class": Case(
        numbered("crash test/1.png", "wind test/2.png"), {"train": {0: "crash test", 1: "wind test"}}
    ),
    "a split's name as a class": Case(numbered("car/1.png", "train/2.png"), {"train": {0: "car", 1: "train"}}),
    "splits or classes": Case(numbered("train/1.png", "crash_test/2.png"), "are these splits or classes"),
    "more than splits": Case(SPLIT | {"docs/logo.png": 9}, "which mark splits, but also 'docs'"),
    "loose images beside splits": Case(SPLIT | {"logo.png": 9}, "which mark splits, but also images outside of them"),
    "no training split": Case(numbered("test/1.png"), "all of the split test"),
    "loose images beside classes": Case(PETS | {"logo.png": 9}, "logo.png lies in no class folder"),
    "loose images without classes": Case(
        PETS | {"logo.png": 9}, {"train": dict.fromkeys((0, 1, 2, 3, 9), "all")}, options={"labels": "none"}
    ),
    "a class that only the test split has": Case(SPLIT | {"val/cow/5.png": 4}, "classes of val include 'cow'"),
    "no labels": Case(FLAT, ALL, told=("all images are of one class",)),
    "labels that are not wanted": Case(PETS, ALL, options={"labels": "none"}),
    "folders that number": Case(EDM, ALL, told=("the folders 00000, 00001 number the images",)),
    "folders that number and are classes": Case(
        EDM, {"train": {0: "00000", 1: "00000", 2: "00001", 3: "00001"}}, options={"labels": "folder"}
    ),
    "numbers that may be classes": Case(
        numbered("00001/x1.png", "00001/x3.png", "00002/x2.png", "00002/x4.png"), "Add --labels folder or --labels none"
    ),
    "dataset.json": Case(EDM, NUMBERS, EDM_LABELS, told=("labels: dataset.json",)),
    "dataset.json without labels": Case(
        EDM, ALL, {"dataset.json": b'{"labels": null}'}, told=("left out 1 .json file",)
    ),
    "dataset.json of vectors": Case(
        FLAT, "is not a whole number", {"dataset.json": text({"labels": [["a.png", [0.1]]]})}
    ),
    "dataset.json of another form": Case(FLAT, "is not of the form", {"dataset.json": b'{"labels": {"a": 1}}'}),
    "dataset.json that forgets one": Case(
        FLAT,
        r"d\.png has no label in dataset\.json",
        {"dataset.json": text({"labels": [["a.png", 0], ["b.png", 0], ["c.png", 0]]})},
    ),
    "metadata.csv": Case(FLAT, BY_FOLDER, {"metadata.csv": ROWS}, told=("labels: metadata.csv",)),
    "labels.csv with other titles": Case(
        FLAT, NUMBERS, {"labels.csv": b"\xef\xbb\xbfid;class_id\r\na;0\r\nb;1\r\nc;1.0\r\nd;2\r\n"}
    ),
    "metadata.csv of captions": Case(FLAT, ALL, {"metadata.csv": b"file_name,text\na.png,x\n"}, told=("1 .csv file",)),
    "metadata.jsonl": Case(
        FLAT,
        BY_FOLDER,
        {
            "metadata.jsonl": b"\n".join(
                text({"file_name": name, "label": label})
                for name, label in zip(FLAT, ("cat", "cat", "dog", "dog"), strict=True)
            )
        },
    ),
    "a table of one's own": Case(
        FLAT, NUMBERS, {"list.txt.csv": b"a.png,0\nb.png,1\nc.png,1\nd.png,2\n"}, options={"labels": "csv:list.txt.csv"}
    ),
    "a table that speaks of others too": Case(
        FLAT,
        BY_FOLDER,
        {"metadata.csv": ROWS + b"z.png,cow\n"},
        told=("1 images that are not there, for example z.png",),
    ),
    "a table that contradicts itself": Case(
        FLAT, "gives a.png the labels 'cat' and 'dog'", {"metadata.csv": ROWS + b"a.png,dog\n"}
    ),
    "a table with a ragged row": Case(FLAT, "row 6 has 3 columns, not 2", {"metadata.csv": ROWS + b"a.png,dog,x\n"}),
    "a table in each split": Case(
        numbered("train/1.png", "train/2.png", "test/1.png", "test/2.png"),
        BY_SPLIT,
        {f"{split}/metadata.csv": b"file_name,label\n1.png,cat\n2.png,dog\n" for split in ("train", "test")},
    ),
    "Tiny ImageNet": Case(
        TINY | {"test/images/test_0.png": 4},
        {"train": {0: "n1", 1: "n2"}, "test": {2: "n2", 3: "n1"}},
        {
            "val/val_annotations.txt": b"val_0.png\tn2\t0\t0\t9\t9\nval_1.png\tn1\t0\t0\t9\t9\n",
            "wnids.txt": b"n1\nn2\n",
        },
        told=("left out 1 images of test, which have no label",),
    ),
    "Tiny ImageNet without its table": Case(TINY, "classes of val include 'images'"),
    "two sources of labels": Case(
        PETS,
        "states different labels in dataset.json and folder: choose with --labels dataset.json or --labels folder or",
        {"dataset.json": text({"labels": [[name, 0] for name in PETS]})},
    ),
    "two sources of the same labels": Case(
        PETS,
        BY_FOLDER,
        {"metadata.csv": b"file_name,label\n" + b"".join(f"{name},{name[:3]}\n".encode() for name in PETS)},
    ),
    "one of two sources": Case(
        PETS, BY_FOLDER, {"dataset.json": text({"labels": [[name, 0] for name in PETS]})}, options={"labels": "folder"}
    ),
    "a source that is not there": Case(
        PETS, "states no labels for --labels dataset.json", options={"labels": "dataset.json"}
    ),
    "small files .cls": Case(
        FLAT, NUMBERS, {f"{key}.cls": b"%d\n" % n for key, n in zip("abcd", (0, 1, 1, 2), strict=True)}
    ),
    "small files .json": Case(
        FLAT,
        NUMBERS,
        {
            "a.json": text({"label": "0"}),
            "b.json": text({"class": 1.0}),
            "c.json": text({"cls": 1}),
            "d.json": text({"class_id": "2"}),
        },
    ),
    "small files .json with names": Case(
        FLAT,
        BY_FOLDER,
        {f"{key}.json": text({"label": name}) for key, name in zip("abcd", ("cat", "cat", "dog", "dog"), strict=True)},
    ),
    "small files .txt, asked for": Case(
        FLAT,
        BY_FOLDER,
        {f"{key}.txt": name for key, name in zip("abcd", (b"cat", b"cat", b"dog", b"dog\r\n"), strict=True)},
        options={"labels": ".txt"},
    ),
    "captions, not asked for": Case(
        FLAT, ALL, {f"{key}.txt": b"a cat" for key in "abcd"}, told=("left out 4 .txt files",)
    ),
    "a label without its image": Case(
        FLAT, r"e\.cls has a label but no image", {f"{key}.cls": b"0" for key in "abcde"}
    ),
    "an image without its label": Case(FLAT, r"d\.png has no label in \.cls", {f"{key}.cls": b"0" for key in "abc"}),
    "labels with a gap": Case(
        FLAT, "none of 1", {f"{key}.cls": n for key, n in zip("abcd", (b"0", b"0", b"2", b"2"), strict=True)}
    ),
    "labels with a gap that is meant": Case(
        FLAT,
        {"train": {0: "0", 1: "0", 2: "2", 3: "2"}},
        {f"{key}.cls": n for key, n in zip("abcd", (b"0", b"0", b"2", b"2"), strict=True)},
        options={"classes": 5},
    ),
    "a number of classes with names": Case(
        PETS, "--classes has no effect on labels that are names", options={"classes": 3}
    ),
    "a number of classes without labels": Case(
        FLAT, "--classes has no effect where there are no", options={"classes": 3}
    ),
    "numbers and names": Case(
        FLAT, "some are numbers", {f"{key}.cls": n for key, n in zip("abcd", (b"0", b"1", b"x", b"0"), strict=True)}
    ),
    "negative labels": Case(FLAT, "label '-1' is not a whole number", {f"{key}.cls": b"-1" for key in "abcd"}),
    "keys with dots": Case(numbered("22.01.png", "22.02.png", "img.png"), {"train": dict.fromkeys(range(3), "all")}),
    "keys with dots and labels": Case(
        numbered("22.01.png", "22.02.png"), {"train": {0: "0", 1: "1"}}, {"22.01.cls": b"0", "22.02.cls": b"1"}
    ),
    "backslashes": Case({name.replace("/", "\\"): seed for name, seed in SPLIT.items()}, BY_SPLIT),
    "two spellings of one name": Case(
        numbered(f"train/{CAFE[0]}/1.png", "train/the/2.png", f"test/{CAFE[1]}/3.png", "test/the/4.png"),
        {"train": {0: CAFE[0], 1: "the"}, "test": {2: CAFE[0], 3: "the"}},
    ),
    "hidden files": Case(
        PETS,
        BY_FOLDER,
        {"__MACOSX/cat/._1.png": b"x", "cat/.DS_Store": b"x", ".thumbs/1.png": png(9)},
        told=("left out 3 hidden files",),
    ),
    "other files": Case(
        PETS,
        BY_FOLDER,
        {"cat/a.psd": b"8BPS", "cat/b.psd": b"8BPS", "x/more.rar": b"Rar!", "README": b"x"},
        told=(
            "left out 2 .psd files (a kind of picture that is not read",
            "left out 1 .rar file (to be unpacked",
            "README",
        ),
    ),
    "no images": Case({}, r"there are no images .* but 2 \.txt", {"a/a.txt": b"x", "a/b.txt": b"y"}),
}
SIMILAR = {
    "class folders",
    "splits of class folders",
    "dataset.json",
    "metadata.csv",
    "small files .cls",
    "hidden files",
    "two sources of labels",
    "keys with dots",
    "backslashes",
    "labels with a gap",
    "other files",
}
"""What is tried in the containers that are read as a plain tar is, once they are unpacked."""


@pytest.mark.parametrize(
    ("name", "container"),
    [(name, kind) for name in CASES for kind in CONTAINERS if kind in ("folder", "zip", "tar") or name in SIMILAR],
)
def test_every_file_is_used_or_named_and_every_label_known(tmp_path: Path, name: str, container: str) -> None:
    case = CASES[name]
    source = CONTAINERS[container](
        tmp_path / "in", {**{n: png(seed) for n, seed in case.images.items()}, **case.others}
    )
    options: dict[str, Any] = {**CHOICES.__dict__, "rewrite": container in REWRITTEN, **case.options}
    if isinstance(case.wanted, str) or len(case.wanted) > 1:
        options |= {"held_out": None}
    told: list[str] = []
    if isinstance(case.wanted, str):
        with pytest.raises(DataError, match=case.wanted):
            prepare("mine", source, str(tmp_path / "set"), choices=Choices(**options), tell=told.append)
        return
    manifest = prepare("mine", source, str(tmp_path / "set"), choices=Choices(**options), tell=told.append)
    found = {
        split: sorted(images) for split, images in read(str(tmp_path / "set"), manifest, tmp_path / "cache").items()
    }
    assert found == {
        split: sorted((pixels(seed).tobytes(), label) for seed, label in labels.items())
        for split, labels in case.wanted.items()
    }
    everything = "\n".join(told)
    assert all(text in everything for text in case.told), everything
    for split, labels in case.wanted.items():
        assert f"{split:5s} {len(labels):>9,} images, {len(manifest.class_names)} class" in everything
