"""Ways to spoil a world, and what a command must say of each."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from made import write_split
from world import Outcome, World, edit_json

from bcm.checkpoint import INDEX
from bcm.inference import SCHEDULES
from data.manifest import MANIFEST_NAME, load_manifest, write_manifest
from data.prepare.pack import Sample
from pipelines.models import run as runs


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


Spoil = Callable[[World], None]


def wider(world: World) -> None:
    edit_json(world.checkpoint / INDEX, lambda entry: entry["network"].update(width=16))


def of_unknown_kind(world: World) -> None:
    edit_json(world.checkpoint / INDEX, lambda entry: entry["network"].update(kind="unet"))


def with_cut_index(world: World) -> None:
    path = world.checkpoint / INDEX
    path.write_text(path.read_text()[:100])


def unfinished(world: World) -> None:
    (world.checkpoint / INDEX).unlink()


def without_weights(world: World) -> None:
    (world.checkpoint / "ema.safetensors").unlink()


def with_cut_schedules(world: World) -> None:
    (world.run / SCHEDULES).write_text('{"sample-2": {"kind"')


def with_a_list_of_schedules(world: World) -> None:
    (world.run / SCHEDULES).write_text("[1, 2]")


def with_disordered_schedules(world: World) -> None:
    (world.run / SCHEDULES).write_text('{"sample-2": {"kind": "ancestral", "times": [0.002, 90, 80]}}')


def with_misnamed_schedules(world: World) -> None:
    (world.run / SCHEDULES).write_text('{"sample-7": {"kind": "ancestral", "times": [0.002, 1, 80]}}')


def with_cut_record(world: World) -> None:
    (world.run / runs.RECORD).write_text('{"name": ')


def with_another_record(world: World) -> None:
    (world.run / runs.RECORD).write_text('{"name": "x"}')


def without_manifest(world: World) -> None:
    (world.data / MANIFEST_NAME).unlink()


def with_cut_manifest(world: World) -> None:
    path = world.data / MANIFEST_NAME
    path.write_text(path.read_text()[:500])


def with_wrong_counts(world: World) -> None:
    edit_json(world.data / MANIFEST_NAME, lambda entry: entry["splits"]["train"].update(count=1499))


def without_shard(world: World) -> None:
    (world.data / "train-000001.tar").unlink()


def with_truncated_shard(world: World) -> None:
    with (world.data / "train-000001.tar").open("r+b") as file:
        file.truncate(100_000)


def with_damaged_shard(world: World) -> None:
    flip_a_byte(world.data / "train-000001.tar")


def with_a_large_image(world: World) -> None:
    """A set whose manifest says 8x8, and fits its shards in all but the size of the images."""
    images = np.zeros((40, 9, 9), dtype=np.uint8)
    samples = [Sample(key=f"large{i:02d}", image=image, label=0) for i, image in enumerate(images)]
    before = load_manifest(str(world.data))
    splits = {**before.splits, "train": write_split(str(world.data), "train", samples)}
    write_manifest(str(world.data), replace(before, splits=splits))


LISTED: list[tuple[Spoil, str]] = [
    (without_manifest, "there is no data set at {data} (no manifest.json)"),
    (with_cut_manifest, "{data}/manifest.json is not a valid manifest: invalid json"),
    (with_wrong_counts, "{data}/manifest.json is not a valid manifest: train: the shards hold 1500 images"),
    (without_shard, "{data}/train-000001.tar is missing"),
    (with_truncated_shard, "{data}/train-000001.tar has 100000 bytes, but the manifest states "),
]
"""What shows without reading a shard."""
READ: list[tuple[Spoil, str]] = [
    (with_damaged_shard, "{data}/train-000001.tar is damaged: its "),
    (with_a_large_image, "{data}/train-000000.tar: sample large00: the image is 9x9 with 1 channels, but the manifest"),
]
"""What shows when the shards are read."""
REMEDIES = ("python -m pipelines.prepare", "write it again", "write the set again", "write the whole set again")


def says_so(outcome: Outcome, said: str, world: World) -> None:
    assert said.format(data=world.data) in outcome.error
    assert any(remedy in outcome.error for remedy in REMEDIES), outcome.error
