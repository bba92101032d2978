"""`python -m pipelines.sample MODEL`: a picture of what a model generates, inverts and reconstructs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bcm.timesteps import Inversion
from pipelines.cli import Positional, parse, run_command
from pipelines.errors import ConfigError
from pipelines.evaluation.reference import held_out
from pipelines.figures.grid import Row, grid, save
from pipelines.figures.samples import Task, generated, inverted, steps_to_draw
from pipelines.models.source import data_of, model_at


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Draw new images, or held-out images with their noise and their reconstructions, or all of it."""

    model: Positional
    """models:/NAME@ALIAS, or the URL of a run, a checkpoint or an imported model."""
    task: Task = "generate"
    """generate new images, invert real ones and reconstruct them, or all: samples at every NFE, and reconstructions
    where the model inverts."""
    nfe: int = 0
    """Network calls; 0 takes the most that the model has time steps for."""
    count: int = 10
    """Images in a row of the picture."""
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
        if self.task == "all" and self.nfe:
            raise ConfigError("--task all draws every NFE; leave --nfe out, or choose one task.")


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(SampleOptions, argv, "sample")
    model = model_at(options.model)
    toolkit = model.open(ema_rate=options.ema_rate)
    drawn = steps_to_draw(toolkit, options.task, options.nfe)
    inverts = any(isinstance(steps, Inversion) for steps in drawn)
    x, labels = held_out(toolkit.network, data_of(model, options.data), options.count) if inverts else (None, [])
    if options.dry_run:
        print(f"would draw {options.count} images a row -> {options.out}")
        for steps in drawn:
            print(f"{'invert' if isinstance(steps, Inversion) else 'generate'} with {steps}")
        return
    rows: list[Row] = []
    for steps in drawn:
        if x is not None and isinstance(steps, Inversion):
            seeds = range(options.seed, options.seed + len(x))
            rows += inverted(toolkit, x, labels, steps.nfe, seeds)
        else:
            seeds = range(options.seed, options.seed + options.count)
            rows.append(generated(toolkit, steps.nfe, seeds, options.label))
    save(grid(rows), Path(options.out))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
