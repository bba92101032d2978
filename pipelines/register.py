"""`python -m pipelines.register RUN`: put a scored model, with its schedules and scores, into the MLflow registry."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.cli import Run, parse, run_command
from pipelines.errors import ConfigError
from pipelines.evaluation.scores import read_scores
from pipelines.models.checkpoints import index_of, inference_copy
from pipelines.models.source import model_at
from pipelines.tracking import registry
from pipelines.tracking.client import resolve_uri, score_names
from pipelines.tracking.registry import Registered


@dataclass(frozen=True, kw_only=True)
class RegisterOptions:
    """Register the model of an evaluated run, or an imported one; it becomes the champion if its scores are better."""

    run: Run
    """URL of the run, of a checkpoint, or of the imported model."""
    name: str | None = None
    """Name of the registered model; by default bcm-RECIPE, and needed by an imported model."""
    ema_rate: float | None = None
    """Which average of the weights to register, as given to evaluate; by default the first, which serves."""
    dry_run: bool = False
    """Print what would be registered and stop."""


def register(options: RegisterOptions) -> Registered | None:
    """Register; the new version, or None for a dry run."""
    model = model_at(options.run)
    # Asked once: a run that is still training may have a newer one by the next line.
    checkpoint = model.checkpoint
    if model.home is None or checkpoint is None:
        raise ConfigError(f"{options.run} is registered already; give the URL of the run it came from.")
    schedules, run = model.schedules(), model.run
    rows = read_scores(model.home, index_of(checkpoint).k, schedules, options.ema_rate)
    name = options.name or (f"bcm-{run.config.recipe}" if run else None)
    if name is None:
        raise ConfigError(f"{model.home} was imported and has no recipe to be named after; give --name.")
    if options.dry_run:
        print(f"would register {checkpoint} as {name} with {score_names(rows)}")
        return None
    with inference_copy(checkpoint, schedules, options.ema_rate) as folder:
        return registry.register(
            resolve_uri("runs"),
            name=name,
            folder=folder,
            scores=score_names(rows),
            run_id=run.mlflow_run if run else None,
            tags={"run": run.name, "run_url": run.url, "code": run.code, "manifest_sha256": run.manifest_sha256}
            if run
            else {"imported": checkpoint},
        )


def main(argv: Sequence[str]) -> None:
    """The command line."""
    if registered := register(parse(RegisterOptions, argv, "register")):
        print(f"{registered.name} version {registered.version}: {registered.reason}")


if __name__ == "__main__":
    run_command(main)
