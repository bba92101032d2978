"""Data that turn out damaged while a training runs: its end at once, with the tar and the image at fault."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made import write_split

from data.errors import DataError
from data.manifest import Manifest, Shard, write_manifest
from data.prepare.pack import Sample
from pipelines.recipes import recipe
from pipelines.train import TrainOptions, check
from pipelines.training.launch import launch

SHARDS, IMAGES = 12, 8


def written(folder: Path) -> Manifest:
    """Grey 8x8 PNG images, a few to a shard."""
    images = np.random.default_rng(0).integers(0, 256, (SHARDS * IMAGES, 8, 8), dtype=np.uint8)
    samples = [Sample(key=f"s{number:04d}", image=image, label=number % 10) for number, image in enumerate(images)]
    split = write_split(str(folder), "train", samples, samples_per_shard=IMAGES, encoding="png")
    manifest = Manifest(
        name="digits",
        resolution=8,
        channels=1,
        class_names=tuple("0123456789"),
        flip=False,
        splits={"train": split},
    )
    write_manifest(str(folder), manifest)
    return manifest


def with_a_broken_image(folder: Path, manifest: Manifest) -> Manifest:
    """Image 3 of each shard is cut in the middle; the manifest states the bytes as they are."""
    broken: list[Shard] = []
    for shard in manifest.splits["train"].shards:
        content = bytearray((folder / shard.path).read_bytes())
        start, size = shard.spans[3].tolist()
        content[start + size // 2 : start + size] = bytes(size - size // 2)
        (folder / shard.path).write_bytes(content)
        broken.append(replace(shard, sha256=hashlib.sha256(content).hexdigest()))
    return replace(manifest, splits={"train": replace(manifest.splits["train"], shards=tuple(broken))})


def with_another_byte(folder: Path, manifest: Manifest) -> Manifest:
    """A byte of each shard has changed since the manifest was written."""
    for shard in manifest.splits["train"].shards:
        content = bytearray((folder / shard.path).read_bytes())
        content[int(shard.spans[3, 0]) + 20] ^= 1
        (folder / shard.path).write_bytes(content)
    return manifest


Spoil = Callable[[Path, Manifest], Manifest]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (with_a_broken_image, r"train-0000\d\d\.tar: sample s\d+: not a readable PNG.*prepare verify lists all"),
        (with_another_byte, r"train-0000\d\d\.tar is damaged: its \d+ bytes have SHA-256"),
    ],
    ids=["image", "bytes"],
)
def test_a_fault_of_the_data_ends_a_training_at_once_and_is_named(
    tmp_path: Path, ray_session: None, spoil: Spoil, said: str
):
    from ray.train.v2.api.exceptions import ControllerError

    manifest = written(tmp_path / "set")
    config = recipe("digits", smoke=True)
    training = check(TrainOptions(config=config, storage=str(tmp_path / "runs"), data=str(tmp_path / "set")))
    shutil.rmtree(tmp_path / "cache")
    training = replace(training, manifest=spoil(tmp_path / "set", manifest))
    assert training.config.scaling.max_failures == 3
    with pytest.raises(DataError, match=said) as raised:
        launch(training)
    # What ends the controller itself is not tried again; workers that failed once too often end otherwise.
    assert isinstance(raised.value.__cause__, ControllerError)
