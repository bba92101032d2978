"""`python -m pipelines.evaluate MODEL`: scores of a model on held-out images."""

from collections.abc import Sequence
from dataclasses import dataclass

from bcm.inference import check_task
from pipelines.cli import Model, parse, run_command
from pipelines.errors import ConfigError
from pipelines.evaluation.reference import manifest_for
from pipelines.evaluation.scores import Score, Scores, table, write_scores
from pipelines.evaluation.shards import score_model
from pipelines.models.source import data_of, model_at
from pipelines.tracking.client import check_run, log_scores, resolve_uri, score_names


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure a model: Frechet distance of its samples, and error and kept labels of its reconstructions.

    The distance is one of pixels, not FID; images larger than CIFAR-10's are averaged down to that size for it.
    """

    model: Model
    """models:/NAME@ALIAS, or the URL of a run, a checkpoint or an imported model."""
    data: str | None = None
    """URL of the shards; by default those the run was trained on."""
    samples: int = 2000
    """Samples at each NFE."""
    images: int | None = None
    """Held-out images to reconstruct, the first so many; by default all."""
    ema_rate: float | None = None
    """Which average of the weights to measure, if the run kept several; by default the first, which serves."""
    dry_run: bool = False
    """Check the model and the data, print what would be measured, and stop."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.samples < 2:
            raise ConfigError(f"--samples {self.samples}: a Frechet distance needs at least 2.")
        if self.images is not None and self.images < 1:
            raise ConfigError(f"--images {self.images}: an error needs at least 1.")


def evaluate(options: EvaluateOptions) -> tuple[Score, ...]:
    """Score the model, store the scores in its home, log them to its run."""
    model = model_at(options.model)
    data = data_of(model, options.data)
    toolkit = model.open(ema_rate=options.ema_rate)
    check_task(toolkit, "sample")
    manifest = manifest_for(toolkit.network, data)
    if model.run:
        check_run(resolve_uri("runs"), model.run.mlflow_run, model.run.name)
    if options.dry_run:
        print(f"would measure {options.model} after {toolkit.k} steps with {', '.join(toolkit.schedules)} on {data}")
        return ()
    rows = score_model(toolkit, data, manifest, options.samples, options.images)
    if model.home:
        scores = Scores(k=toolkit.k, ema_rate=options.ema_rate, schedules=toolkit.schedules, rows=rows)
        write_scores(model.home, scores)
    if model.run:
        log_scores(resolve_uri("runs"), model.run.mlflow_run, score_names(rows), toolkit.k)
    return rows


def main(argv: Sequence[str]) -> None:
    """The command line."""
    if rows := evaluate(parse(EvaluateOptions, argv, "evaluate")):
        print(table(rows))


if __name__ == "__main__":
    run_command(main)
