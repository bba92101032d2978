"""`python -m pipelines.picture MODEL`: one picture of everything a model does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bcm.inference import check_task
from pipelines.cli import Positional, parse, run_command
from pipelines.errors import ConfigError
from pipelines.evaluate import data_of
from pipelines.figures import grid as pictures
from pipelines.models import source as models
from pipelines.sample import generated, inverted, test_images


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Draw samples at every NFE, and, where the model inverts, held-out images with their noise and reconstructions."""

    model: Positional
    """models:/NAME@ALIAS, or the URL of a run, a checkpoint or an imported model."""
    data: str | None = None
    """URL of the shards; by default those the run was trained on."""
    count: int = 12
    """Images in a row."""
    out: str = "picture.png"
    """The PNG to write."""
    dry_run: bool = False
    """Print what would be drawn and stop."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.count < 1:
            raise ConfigError("--count must be at least 1.")


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(PictureOptions, argv, "picture")
    toolkit = models.open_model(options.model)
    check_task(toolkit, "sample")
    nfes = sorted(steps.nfe for name, steps in toolkit.schedules.items() if name.startswith("sample-"))
    inverts = any(name.startswith("invert-") for name in toolkit.schedules)
    held_out = test_images(toolkit, data_of(options.model, options.data), options.count) if inverts else None
    if options.dry_run:
        shown = f" and {len(held_out[0])} reconstructions" if held_out else ""
        print(f"would draw samples at NFE {nfes}{shown} -> {options.out}")
        return
    rows = [generated(toolkit, nfe, options.count, 0) for nfe in nfes]
    if held_out:
        x, labels = held_out
        rows += inverted(toolkit, x, labels, 4 if "invert-4" in toolkit.schedules else 0, 0)
    pictures.save(pictures.grid(rows), Path(options.out))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
