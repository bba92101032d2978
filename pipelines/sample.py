"""`python -m pipelines.sample MODEL`: pictures or files of what a model generates, inverts and reconstructs."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Literal

from bcm.timesteps import Inversion
from pipelines.cli import Bar, Model, durable, parse, run_command
from pipelines.errors import ConfigError
from pipelines.evaluation.reference import held_out
from pipelines.figures.files import write_arrays, write_files
from pipelines.figures.grid import FORMATS, grid, picture_format, save
from pipelines.figures.samples import Task, drawn, joined, steps_to_draw
from pipelines.models.source import data_of, model_at


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Draw new images, or held-out images with their noise and their reconstructions, or all of it."""

    model: Model
    """models:/NAME@ALIAS, or the URL of a run, a checkpoint or an imported model."""
    task: Task = "generate"
    """generate new images, invert real ones and reconstruct them, or all: samples at every NFE, and reconstructions
    where the model inverts."""
    nfe: int = 0
    """Network calls; 0 takes the most that the model has time steps for."""
    count: int = 16
    """Images, of each kind that the task has."""
    seed: int = 0
    """The first image's seed; image i has seed + i, whatever the count."""
    label: int | None = None
    """Class of all new images; by default image i of a model with C classes has class (seed + i) modulo C."""
    data: str | None = None
    """URL of the shards with the images to invert; by default those the run was trained on."""
    ema_rate: float | None = None
    """Which average of the weights to use, if the run kept several; by default the first, which serves."""
    out: str | None = None
    """What to write, a path or URL: a picture (.png, .jpg, .webp), an array (.npz), or a folder for PNG files. By
    default it lies in runs/pictures, named after the model and the task."""
    format: Literal["grid", "png", "npz"] | None = None
    """grid, one picture of all; png, a file SEED.png for each image; or npz, arr_0 of uint8 (B, H, W, 3) as evaluators
    read it, arr_1 the labels. By default what --out ends in says it."""
    dry_run: bool = False
    """Print what would be drawn and stop."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.count < 1 or self.seed < 0 or self.nfe < 0:
            raise ConfigError("--count must be at least 1, --seed and --nfe at least 0.")
        if self.task == "all" and self.nfe:
            raise ConfigError("--task all draws every NFE; leave --nfe out, or choose one task.")
        if self.form == "grid" and self.out:
            picture_format(self.out)
        if self.form == "png" and self.out and self.out.endswith((*FORMATS, ".npz")):
            raise ConfigError(f"--out {self.out}: --format png writes many files; give the name of a folder.")

    @property
    def form(self) -> str:
        """What --format says, or else the end of --out."""
        if self.format or self.out is None:
            return self.format or "grid"
        return "npz" if self.out.endswith(".npz") else "grid" if self.out.lower().endswith(tuple(FORMATS)) else "png"


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(SampleOptions, argv, "sample")
    model = model_at(options.model)
    toolkit = model.open(ema_rate=options.ema_rate)
    steps_list = steps_to_draw(toolkit, options.task, options.nfe)
    inverts = any(isinstance(steps, Inversion) for steps in steps_list)
    x, labels = held_out(toolkit.network, data_of(model, options.data), options.count) if inverts else (None, [])
    name = model.home.rpartition("/")[2] if model.home else model.source.removeprefix("models:/").replace("/", "-")
    end = {"grid": ".png", "npz": ".npz", "png": ""}[options.form]
    out = options.out or f"runs/pictures/{name}-{options.task}{f'-nfe{options.nfe}' if options.nfe else ''}{end}"
    durable(out, "--out")
    if options.dry_run:
        print(f"would draw {options.count} images of each kind -> {out}")
        for steps in steps_list:
            print(f"{'invert' if isinstance(steps, Inversion) else 'generate'} with {steps}")
        return
    seeds = range(options.seed, options.seed + options.count)
    with closing(Bar("images")) as bar:
        progress = partial(bar, "sample")
        batches = drawn(toolkit, steps_list, seeds, label=options.label, x=x, labels=labels, progress=progress)
        match options.form:
            case "png":
                write_files(batches, out)
            case "npz":
                write_arrays(batches, out)
            case _:
                save(grid(joined(batches)), out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_command(main)
