"""The same files in every kind of container that `prepare` reads, and what a set that was made of them holds."""

import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow
from made import cached_split
from numpy.typing import NDArray
from PIL import Image

from data.manifest import Manifest

SIDE = 6
Files = Mapping[str, bytes]


def pixels(seed: int, side: int = SIDE) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(seed: int, side: int = SIDE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, side)).save(buffer, format="PNG")
    return buffer.getvalue()


def in_folder(place: Path, files: Files) -> str:
    for name, payload in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload)
    return str(place)


def in_zip(place: Path, files: Files) -> str:
    place.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place / "set.zip", "w") as archive:
        for name, payload in files.items():
            member = zipfile.ZipInfo()
            member.filename = name  # as it is: the constructor would turn backslashes
            archive.writestr(member, payload)
    return str(place / "set.zip")


def tar_of(files: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, payload in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    return buffer.getvalue()


def in_tar(place: Path, files: Files) -> str:
    return in_folder(place, {"set.tar": tar_of(files)})


def in_packed(place: Path, files: Files, codec: str = "gzip", name: str = "set.tgz") -> str:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(tar_of(files))
    return in_folder(place, {name: sink.getvalue().to_pybytes()}) + f"/{name}"


def in_zst(place: Path, files: Files) -> str:
    return in_packed(place, files, "zstd", "set.tar.zst")


def in_two(place: Path, files: Files) -> str:
    """Half in a tar, half in a zip file; tables of labels lie beside the two."""
    loose = {name: payload for name, payload in files.items() if name in ("dataset.json", "metadata.csv")}
    stems = {name.rpartition(".")[0]: None for name in files if name not in loose}
    halves = [
        {name: files[name] for stem in list(stems)[half::2] for name in files if name.rpartition(".")[0] == stem}
        for half in (0, 1)
    ]
    in_folder(place, loose | {"a.tar": tar_of(halves[0])})
    Path(in_zip(place, halves[1])).rename(place / "b.zip")
    return str(place)


CONTAINERS: Mapping[str, Callable[[Path, Files], str]] = {
    "folder": in_folder,
    "zip": in_zip,
    "tar": in_tar,
    "tgz": in_packed,
    "zst": in_zst,
    "two": in_two,
}
REWRITTEN = {"tar"}
"""Containers that would be trained on as they lie, were it not for --rewrite."""


def read(url: str, manifest: Manifest, cache: Path) -> dict[str, list[tuple[bytes, str]]]:
    """Pixels, (height, width, channels), and class of each image of each split."""
    found: dict[str, list[tuple[bytes, str]]] = {}
    for split in manifest.splits:
        whole = cached_split(url, manifest, split, cache)
        found[split] = [
            (image.transpose(1, 2, 0).tobytes(), manifest.class_names[label])
            for image, label in zip(whole.images, whole.labels.tolist(), strict=True)
        ]
    return found
