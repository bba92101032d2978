"""Random sources: images used and files named as left out are all there are; pixels and labels are what they were."""

import csv
import io
import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from containers import CONTAINERS, REWRITTEN, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data.errors import DataError
from data.prepare import Choices, prepare

EXAMPLES = 300
FORMATS = {
    "png": "PNG",
    "PNG": "PNG",
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "jfif": "JPEG",
    "webp": "WEBP",
    "gif": "GIF",
    "tif": "TIFF",
    "bmp": "BMP",
}
MODES = {
    "PNG": ("L", "RGB", "RGBA", "LA", "P", "1"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P"),
    "TIFF": ("L", "RGB", "CMYK"),
    "BMP": ("L", "RGB", "1"),
}
ODD = st.text("aZ0. -_#%+~,;'[]()&=é日", max_size=8)
FORMS = ("folder", "none", "dataset.json", "metadata.csv", "metadata.jsonl", ".cls", ".json", ".txt")
EXTRAS = (".hidden.png", "__MACOSX/._a.png", "notes.md", "a.psd", "nothing", "b.mp4")


@dataclass(frozen=True)
class Made:
    """A random source.

    Attributes:
        files: All its files.
        images: Split and label of each image, by its path.
        extras: How many files are neither images nor labels.
        side: Height and width of the images.
        options: How it must be prepared.
    """

    files: dict[str, bytes]
    images: dict[str, tuple[str, str]]
    extras: int
    side: int
    options: dict[str, str]


def picture(seed: int, side: int, form: str, mode: str, turn: int) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turn
    buffer = io.BytesIO()
    image.save(buffer, form, **({"exif": exif} if turn > 1 and form in ("PNG", "JPEG", "WEBP") else {}))
    return buffer.getvalue()


def as_pillow_reads(payload: bytes) -> bytes:
    with Image.open(io.BytesIO(payload)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB")).tobytes()


def label_files(form: str, labels: dict[str, str]) -> dict[str, bytes]:
    """The files that state the labels of images, in one of the forms."""
    if form == "dataset.json":
        return {form: json.dumps({"labels": [[name, int(label)] for name, label in labels.items()]}).encode()}
    if form == "metadata.csv":
        text = io.StringIO()
        csv.writer(text).writerows([("file_name", "label"), *labels.items()])
        return {form: text.getvalue().encode()}
    if form == "metadata.jsonl":
        return {form: "\n".join(json.dumps({"file_name": n, "class": label}) for n, label in labels.items()).encode()}
    stems = {name.rpartition(".")[0]: label for name, label in labels.items()}
    if form == ".json":
        return {f"{stem}.json": json.dumps({"label": float(label)}).encode() for stem, label in stems.items()}
    return {f"{stem}{form}": f"{label}\n".encode() for stem, label in stems.items()} if form[0] == "." else {}


@st.composite
def sources(draw: st.DrawFn) -> Made:
    form = draw(st.sampled_from((*FORMS, "folder", "folder")))
    explicit, marked = draw(st.booleans()), draw(st.booleans())
    explicit = explicit or form in ("none", ".txt")
    side, prefix = draw(st.integers(1, 7)), draw(st.sampled_from(("", "set/", "a/b.c/")))
    # One folder alone around all images is not a class.
    fewest = 2 if form == "folder" else 1
    classes = draw(st.lists(ODD.map(lambda name: f"cZ{name.strip()}"), min_size=fewest, max_size=3, unique=True))
    numeric = form in ("dataset.json", ".cls", ".json")
    names = [str(n) for n in range(len(classes))] if numeric else classes
    kinds = st.tuples(st.sampled_from(sorted(FORMATS)), ODD, st.integers(0, 99), st.sampled_from(("", "x/", "y/z/")))
    images: dict[str, tuple[str, str]] = {}
    files: dict[str, bytes] = {}
    # Each class is in the training split, whatever else there is.
    for split, least in (("train", len(classes)), ("val", 1 if marked else 0)):
        for place in range(draw(st.integers(least, least + 3)) if least else 0):
            suffix, odd, seed, deep = draw(kinds)
            number = place if place < len(classes) and split == "train" else seed % len(classes)
            folder = f"{split}/" if marked else ""
            folder += f"{classes[number]}/" if form == "folder" else ""
            folder += deep if form == "folder" or explicit else ""
            name = f"{prefix}{folder}{len(images)}{odd}.{suffix}"
            mode = draw(st.sampled_from(MODES[FORMATS[suffix]]))
            files[name] = picture(seed, side, FORMATS[suffix], mode, draw(st.integers(1, 8)))
            images[name] = split, names[number]
    stated = {name.removeprefix(prefix): label for name, (_, label) in images.items()}
    labels = {prefix + name: payload for name, payload in label_files(form, stated).items()}
    extras = {prefix + name: b"x" for name in draw(st.sets(st.sampled_from(EXTRAS)))}
    if form == "none":
        images = {name: (split, "all") for name, (split, _) in images.items()}
    options = {"labels": form} if explicit else {}
    return Made(files | labels | extras, images, len(extras), side, options)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(made=sources(), container=st.sampled_from(("folder", "zip", "tar", "tgz", "as they lie")))
def test_nothing_is_lost_turned_or_mislabelled(made: Made, container: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        put = CONTAINERS["tar" if container == "as they lie" else container]
        source, to, told = put(Path(folder) / "in", made.files), f"{folder}/set", list[str]()
        kept = container == "as they lie"
        choices = Choices(
            resolution=None if kept else made.side,
            held_out=None if kept or len({split for split, _ in made.images.values()}) > 1 else 0,
            rewrite=container in REWRITTEN,
            labels=made.options.get("labels"),
        )
        try:
            manifest = prepare("mine", source, to, choices=choices, tell=told.append)
        except DataError as error:
            assert kept and "--rewrite" in str(error), error
            return
        found = read(to, manifest, Path(folder) / "cache")
    wanted: dict[str, Counter[tuple[bytes, str]]] = {}
    for name, (split, label) in made.images.items():
        pixels = as_pillow_reads(made.files[name])
        wanted.setdefault(split.replace("val", "test"), Counter())[pixels, label] += 1
    if kept:  # grey images stay grey there
        step = 3 // manifest.channels
        wanted = {
            split: Counter({(data[::step], label): count for (data, label), count in those.items()})
            for split, those in wanted.items()
        }
    assert {split: Counter(images) for split, images in found.items()} == wanted
    left_out = sum(int(number) for line in told for number in re.findall(r"^note: left out (\d+)", line))
    assert left_out == made.extras, told
