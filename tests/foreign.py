"""Weights of other code bases, tiny, with known outputs; and shards of random images that fit them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from made import write_split
from torch import Tensor
from world import Command

from data.manifest import Manifest, write_manifest
from data.prepare.pack import Sample

CLASSES = 10
RESOLUTION = 16
ADM = ("--source", "official-imagenet64", "--network-options", "resolution=16", "head_channels=16")
EDM = ("--source", "edm-ncsnpp")
ICT, BCM, NCSNPP = "adm_ict_tiny", "adm_bcm_tiny", "ncsnpp_tiny"
"""Golden networks."""


@dataclass(frozen=True)
class Golden:
    """A foreign network: its state dict, what goes into it, and what comes out."""

    state: dict[str, Tensor]
    x: Tensor
    t: Tensor
    u: Tensor
    label: Tensor | None
    F: Tensor


def golden(shared: Path, name: str) -> Golden:
    """The golden network `name`."""
    path = shared / "golden" / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"reference data not found at {path}")
    with np.load(path) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    state = {key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")}
    t = arrays["t"]
    return Golden(state, arrays["x"], t, arrays.get("u", t), arrays.get("y"), arrays["F"])


def write_shards(url: str, train: int = 60, test: int = 12) -> None:
    """Random images of the size and classes of the golden networks."""
    rng = np.random.default_rng(0)
    splits = {
        split: write_split(
            url,
            split,
            [
                Sample(
                    key=f"{split}{i:03d}",
                    image=rng.integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8),
                    label=i % CLASSES,
                )
                for i in range(count)
            ],
        )
        for split, count in (("train", train), ("test", test))
    }
    names = tuple(str(label) for label in range(CLASSES))
    write_manifest(
        url,
        Manifest(name="noise", resolution=RESOLUTION, channels=3, class_names=names, flip=False, splits=splits),
    )


def write_npz(state: dict[str, Tensor], path: Path) -> None:
    """A state dict as numpy saves it."""
    np.savez(path, allow_pickle=False, **{name: value.numpy() for name, value in state.items()})


def imported(command: Command, path: Path, options: tuple[str, ...] = ADM) -> str:
    """The folder of the model that the command makes of a file."""
    to = str(path.with_name("imported"))
    outcome = command("import_weights", str(path), *options, "--to", to)
    assert outcome.code == 0, outcome
    return to
