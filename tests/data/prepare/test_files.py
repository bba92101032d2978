"""Folders and zip files of images: splits, classes, order; on a disk and on a server."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from made import cached_split
from PIL import Image

from data import store
from data.errors import DataError
from data.manifest import Manifest
from data.prepare import Choices, prepare
from data.prepare.assign import Assigned, Rules, assign
from data.prepare.files import File, Item, entries
from data.prepare.inspect import layout_of
from data.prepare.layout import Stretch, shard_ranges
from data.prepare.source import look_at, opened
from data.prepare.write import in_turn

CHOICES = Choices(resolution=6, samples_per_shard=4)


def png(seed: int, side: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, side)).save(buffer, format="PNG")
    return buffer.getvalue()


def pixels(seed: int, side: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def fill(root: str, content: Mapping[str, bytes]) -> str:
    for name, payload in content.items():
        store.write_bytes(store.join(root, name), payload)
    return root


def zipped(path: Path, content: Mapping[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, payload in content.items():
            archive.writestr(name, payload)
    return str(path)


def images_of(url: str, manifest: Manifest, split: str, cache: Path) -> list[tuple[int, bytes]]:
    cached = cached_split(url, manifest, split, cache)
    return [
        (int(label), image.tobytes()) for label, image in zip(cached.labels, np.asarray(cached.images), strict=True)
    ]


def expected(seeds: Mapping[int, int]) -> set[tuple[int, bytes]]:
    return {(label, pixels(seed).transpose(2, 0, 1).tobytes()) for seed, label in seeds.items()}


def test_class_folders_become_labels_and_every_image_is_kept(tmp_path: Path, bucket: str) -> None:
    names = {f"{'cat' if seed < 12 else 'dog'}/{seed}.png": seed for seed in range(30)}
    content = {name: png(seed) for name, seed in names.items()} | {"readme.txt": b"x", ".thumbs/a.png": b"y"}
    told: list[str] = []
    places = [
        fill(str(tmp_path / "folder"), content),
        fill(f"{bucket}/folder", content),
        zipped(tmp_path / "images.zip", content),
        fill(f"{bucket}/zip", {"images.zip": (tmp_path / "images.zip").read_bytes()}) + "/images.zip",
    ]
    sets = [
        prepare("pets", place, str(tmp_path / f"set{number}"), choices=CHOICES, tell=told.append)
        for number, place in enumerate(places)
    ]
    assert len({manifest.sha256 for manifest in sets}) == 1
    manifest = sets[0]
    assert manifest.class_names == ("cat", "dog")
    assert {split: part.count for split, part in manifest.splits.items()} == {"train": 27, "test": 3}
    found = [images_of(str(tmp_path / "set0"), manifest, split, tmp_path / "cache") for split in ("train", "test")]
    assert {*found[0], *found[1]} == expected({seed: int(seed >= 12) for seed in range(30)})
    assert len({label for label, _ in found[0][:8]}) == 2, "the classes are not dealt to all shards"
    assert told[:2] == [
        "note: left out 1 .txt file (no images), for example readme.txt",
        "note: left out 1 hidden file, for example .thumbs/a.png",
    ]


def test_ffhq_holds_out_its_last_images_and_folders_are_no_classes(tmp_path: Path) -> None:
    content = {f"thumbnails128x128/{n // 10:05d}/{n:05d}.png": png(n, side=80) for n in range(20)}
    told: list[str] = []
    manifest = prepare("ffhq64", zipped(tmp_path / "ffhq.zip", content), str(tmp_path / "set"), tell=told.append)
    assert (manifest.class_names, manifest.flip, manifest.resolution) == (("face",), True, 64)
    assert told[:-1] == ["note: the source holds 18 train, 2 test images, but ffhq64 has 69,000 train, 1,000 test"]
    items = assigned(*content, class_names=("face",)).splits
    assert [item.file.name[-9:] for item in items["test"]] == ["00018.png", "00019.png"]


def assigned(*names: str, class_names: tuple[str, ...] = (), held_out: int | None = None) -> Assigned:
    files = [File(name=name, size=1) for name in names]
    return assign(files, "root", Rules(class_names=class_names, held_out=held_out), lambda wanted: iter(()))


def listed(*names: str) -> dict[str, list[str]]:
    found = assigned(*names)
    return {
        split: sorted(f"{found.class_names[item.label]}:{item.file.name}" for item in items)
        for split, items in found.splits.items()
    }


def test_marked_splits_and_needless_folders() -> None:
    assert listed("in/train/n1/a.JPEG", "in/train/n2/d.JPEG", "in/val/n1/b.JPEG", "in/val/n2/c.JPEG") == {
        "train": ["n1:in/train/n1/a.JPEG", "n2:in/train/n2/d.JPEG"],
        "test": ["n1:in/val/n1/b.JPEG", "n2:in/val/n2/c.JPEG"],
    }
    assert listed("bedroom_train/x/a.webp", "bedroom_val/x/b.webp") == {
        "train": ["x:bedroom_train/x/a.webp"],
        "test": ["x:bedroom_val/x/b.webp"],
    }
    assert listed("train/a.png", "val/b.png", "test/c.png").keys() == {"train", "val", "test"}
    assert listed("car/a.png", "train/b.png") == {"train": ["car:car/a.png", "train:train/b.png"]}
    assert listed("a.png", "b.jpg") == {"train": ["all:a.png", "all:b.jpg"]}


def test_the_layout_depends_on_the_listing_alone(tmp_path: Path) -> None:
    fill(str(tmp_path / "a"), {f"{n % 3}/{n}.png": png(n) for n in range(25)})
    (tmp_path / "a").rename(tmp_path / "b")
    layouts = []
    for _ in range(2):
        with opened(look_at("x", str(tmp_path / "b")), None, in_turn) as source:
            layouts.append(layout_of("x", source, CHOICES))
        (tmp_path / "b").rename(tmp_path / "c")
        (tmp_path / "c").rename(tmp_path / "b")
    assert layouts[0] == layouts[1]
    assert [shards.fingerprint(layouts[0].form) for shards in layouts[0].ranges] == [
        shards.fingerprint(layouts[1].form) for shards in layouts[1].ranges
    ]
    assert layouts[0].counts == {"train": 23, "test": 2}


def test_ranges_number_their_shards_in_order() -> None:
    stretches = [Stretch(kind="none", images=n, count=n, read=lambda *_: iter(())) for n in (25, 3)]
    ranges = shard_ranges("train", stretches, 2)
    assert [(shards.first, shards.start, shards.counts) for shards in ranges] == [
        (0, 0, (2,) * 8),
        (8, 16, (2, 2, 2, 2, 1)),
        (13, 0, (2, 1)),
    ]
    assert ranges[1].only(1, 3) == shard_ranges("train", stretches, 2)[1].only(1, 4).only(0, 2)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.txt"], "no images .* at"),
        (["a.png", "cat/b.png"], "a.png lies in no class folder, but others do, for example in 'cat'"),
        (["test/a.png"], "all of the split test"),
    ],
)
def test_listings_that_make_no_set(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        assigned(*names)


def test_sizes_are_bounded_before_anything_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**36)  # it would not fit in memory
    item = Item(file=File(name="a.png", size=2**36), label=0, number=0)
    (entry,) = entries(str(tmp_path), {}, [item], 0, 1)
    assert (entry.payload, entry.problem) == (b"", "has 68719476736 bytes, not 1 to 67108864")
    with pytest.raises(DataError, match="7 images cannot be held out of 7"):
        assigned(*(f"{n}.png" for n in range(7)), held_out=7)


def test_damaged_images_are_named_in_one_error_and_the_rest_is_kept(tmp_path: Path) -> None:
    content = {f"{n:02d}.png": png(n) for n in range(20)}
    bad = {"03.png": b"not an image", "11.png": png(11)[:60], "12.png": png(12, side=5)}
    source = fill(str(tmp_path / "in"), content | bad)
    with pytest.raises(DataError, match="3 images of the source cannot be used") as caught:
        prepare("x", source, str(tmp_path / "set"), choices=CHOICES)
    assert [f"{source}/{name}" in str(caught.value) for name in bad] == [True] * 3
    # The shards of four images that hold none of the three are there; the manifest is not.
    assert store.list_names(str(tmp_path / "set")) == ["test-000000.tar", "train-000001.tar", "train-000004.tar"]
    kept = (tmp_path / "set" / "train-000001.tar").stat().st_mtime_ns
    fill(source, {name: content[name] for name in bad})
    manifest = prepare("x", source, str(tmp_path / "set"), choices=CHOICES)
    assert (tmp_path / "set" / "train-000001.tar").stat().st_mtime_ns == kept
    assert prepare("x", source, str(tmp_path / "fresh"), choices=CHOICES) == manifest


def test_a_damaged_zip_is_explained(tmp_path: Path) -> None:
    path = Path(zipped(tmp_path / "a.zip", {f"{n}.png": png(n) for n in range(20)}))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.zip is not a whole zip file"):
        prepare("x", str(path), str(tmp_path / "set"), choices=CHOICES)
    path.write_bytes(whole[:60] + bytes([whole[60] ^ 255]) + whole[61:])
    with pytest.raises(DataError, match=r"a\.zip/0\.png"):
        prepare("x", str(path), str(tmp_path / "set"), choices=CHOICES)


def test_own_sets_need_a_size_and_a_plain_name(tmp_path: Path) -> None:
    source = fill(str(tmp_path / "in"), {"a.png": png(0)})
    with pytest.raises(DataError, match=r"unknown data set 'x'.*give their --resolution"):
        prepare("x", source, str(tmp_path / "set"))
    with pytest.raises(DataError, match="the name 'X y' must be of"):
        prepare("X y", source, str(tmp_path / "set"), choices=CHOICES)
    with pytest.raises(DataError, match="ffhq64 has resolution 64, not 6"):
        prepare("ffhq64", source, str(tmp_path / "set"), choices=CHOICES)
    with pytest.raises(DataError, match="no files at"):
        prepare("x", str(tmp_path / "nothing"), str(tmp_path / "set"), choices=CHOICES)
