"""`python -m pipelines.sample MODEL`: a picture of what a model generates, inverts and reconstructs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bcm import inference
from bcm.inference import Toolkit, steps_for
from bcm.types import Images, from_uint8
from data.cache import cached_split, default_cache_dir
from pipelines.cli import Positional, parse, run_command
from pipelines.errors import ConfigError
from pipelines.evaluate import data_of, fitting_manifest
from pipelines.figures import grid as pictures
from pipelines.figures.grid import Row
from pipelines.models import source as models


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Draw new images, or held-out images with their noise and their reconstructions."""

    model: Positional
    """models:/NAME@ALIAS, or the URL of a run, a checkpoint or an imported model."""
    task: Literal["generate", "invert"] = "generate"
    """generate new images, or invert real ones and reconstruct them."""
    nfe: int = 0
    """Network calls; 0 takes the most that the model has time steps for."""
    count: int = 10
    """Images in the picture."""
    seed: int = 0
    """The first image's seed; image i has seed + i, whatever the count."""
    label: int | None = None
    """Class of all new images; by default image i of a model with C classes has class (seed + i) modulo C."""
    data: str | None = None
    """URL of the shards with the images to invert; by default those the run was trained on."""
    ema_rate: float | None = None
    """Which average of the weights to use, if the run kept several; by default the first, which serves."""
    out: str = "samples.png"
    """The PNG to write."""
    dry_run: bool = False
    """Print what would be drawn and stop."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.count < 1 or self.seed < 0 or self.nfe < 0:
            raise ConfigError("--count must be at least 1, --seed and --nfe at least 0.")


def test_images(toolkit: Toolkit, data: str, count: int) -> tuple[Images, list[int]]:
    """The first held-out images, (B, C, H, W), and their labels."""
    split = cached_split(data, fitting_manifest(toolkit, data), "test", default_cache_dir())
    return from_uint8(torch.tensor(split.images[:count])), split.labels[:count].tolist()


def generated(toolkit: Toolkit, nfe: int, count: int, seed: int, label: int | None = None) -> Row:
    """New images, all of class `label` where it is given."""
    steps, classes = steps_for(toolkit, "sample", nfe), toolkit.network.classes
    seeds = list(range(seed, seed + count))
    labels = [s % classes for s in seeds] if classes else None
    if label is not None:
        labels = [label] * count
    return Row(f"samples\nNFE {steps.nfe}", inference.generate(toolkit, seeds, steps.nfe, labels))


def inverted(toolkit: Toolkit, x: Images, labels: Sequence[int], nfe: int, seed: int) -> list[Row]:
    """Originals, their noise and their reconstructions."""
    steps, seeds = steps_for(toolkit, "invert", nfe), list(range(seed, seed + len(x)))
    label = list(labels) if toolkit.network.classes else None
    noise = inference.invert(toolkit, x, seeds, steps.nfe, label)
    return [
        Row("held-out images", x),
        Row(f"their noise\nNFE {steps.nfe}", pictures.noise_as_image(noise, steps.times[-1])),
        Row("reconstructions\nNFE 1", inference.reconstruct(toolkit, x, seeds, steps.nfe, label)),
    ]


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(SampleOptions, argv, "sample")
    toolkit = models.open_model(options.model, ema_rate=options.ema_rate)
    steps = steps_for(toolkit, "sample" if options.task == "generate" else "invert", options.nfe)
    if options.dry_run:
        print(f"would {options.task} {options.count} images with {steps} -> {options.out}")
        return
    if options.task == "generate":
        rows = [generated(toolkit, options.nfe, options.count, options.seed, options.label)]
    else:
        data = data_of(options.model, options.data)
        x, labels = test_images(toolkit, data, options.count)
        rows = inverted(toolkit, x, labels, options.nfe, options.seed)
    pictures.save(pictures.grid(rows), Path(options.out))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
