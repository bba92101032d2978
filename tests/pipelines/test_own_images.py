"""What docs/own-images.md shows works as it stands, on one's own folder of photographs."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made import write_split
from PIL import Image
from sklearn.datasets import load_sample_images

from data.manifest import Manifest
from data.prepare.pack import Sample
from pipelines.recipes import recipe

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "own-images.md").read_text()
COMMANDS = re.findall(r"^    (\.venv/.*)$", PAGE, re.MULTILINE)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder like a clone that is installed, with crops of two photographs in two class folders."""
    for package in ("bcm", "cluster", "data", "pipelines"):
        (tmp_path / package).symlink_to(ROOT / package)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    photographs: list[np.ndarray] = load_sample_images().images
    for name, photograph in zip(("temple", "flower"), photographs, strict=True):
        (tmp_path / "my-images" / name).mkdir(parents=True)
        for number in range(24):
            y, x = 64 * (number // 8), 64 * (number % 8)
            crop = Image.fromarray(photograph[y : y + 96, x : x + 80])
            crop.save(tmp_path / "my-images" / name / f"{number}.{'jpg' if number % 2 else 'png'}")
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_page_works_copied_as_it_stands(clone: Path) -> None:
    assert [command.split()[2] for command in COMMANDS] == [
        *("pipelines.prepare", "pipelines.prepare", "pipelines.train", "pipelines.evaluate"),
        *("pipelines.register", "pipelines.sample", "pipelines.sample"),
    ]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(clone / "home"), "OMP_NUM_THREADS": "1"}
    said = ""
    for command in COMMANDS:
        done = subprocess.run(["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        said += done.stdout
    assert "2 classes: flower 22, temple 22" in said or "2 classes: flower 21, temple 22" in said
    for name, least in (("contact-sheet.png", 64), ("samples.png", 8 * 32), ("inverted.png", 4 * 32)):
        with Image.open(clone / "runs" / name) as picture:
            assert picture.width >= least
            assert len(picture.convert("RGB").getcolors(2**24) or ()) > 100, name


def manifest_of(folder: Path, resolution: int, channels: int, classes: tuple[str, ...]) -> Manifest:
    """That of a set of 20 black images."""
    shape = (resolution, resolution, 3) if channels == 3 else (resolution, resolution)
    samples = [Sample(key=f"{i:02d}", image=np.zeros(shape, np.uint8), label=i % len(classes)) for i in range(20)]
    return Manifest(
        name="mine",
        resolution=resolution,
        channels=channels,
        class_names=classes,
        flip=False,
        splits={"train": write_split(str(folder), "train", samples)},
    )


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize(
    ("resolution", "levels"),
    [(8, 1), (9, 1), (28, 3), (32, 3), (48, 3), (64, 4), (100, 3), (256, 6)],
)
def test_the_network_follows_from_the_set(resolution: int, levels: int, smoke: bool, tmp_path: Path) -> None:
    config = recipe("images", smoke, manifest_of(tmp_path / "a", resolution, 1, ("a", "b")))
    network = config.network
    assert (network.resolution, network.image_channels, network.classes) == (resolution, 1, 2)
    assert len(network.channel_mult) == levels
    assert config.dataset == "mine" and config.train.batch_size <= 20
    assert recipe("images", smoke, manifest_of(tmp_path / "b", resolution, 3, ("all",))).network.classes == 0
