"""`python -m pipelines.register RUN`: put a run's model, with its schedules and scores, into the MLflow registry."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from data import storage
from pipelines import models, registry, runs, tracking
from pipelines.config import ConfigError, parse, run_command
from pipelines.evaluate import SCORES
from pipelines.registry import Registered


@dataclass(frozen=True, kw_only=True)
class RegisterOptions:
    """Register the model of an evaluated run; it becomes the champion if its scores are better."""

    run: Annotated[str, tyro.conf.Positional]
    """URL of the run."""
    name: str | None = None
    """Name of the registered model; by default bcm-DATASET."""
    dry_run: bool = False
    """Print what would be registered and stop."""


def register(options: RegisterOptions) -> tuple[str, Registered]:
    """Register; the model's name and its new version."""
    run = runs.read_run(storage.absolute(options.run))
    name, scores = _name(options, run), _scores(run)
    tags = {"run": run.name, "run_url": run.url, "code": run.code, "manifest_sha256": run.manifest_sha256}
    with runs.local_checkpoint(run.url) as directory:
        registered = registry.register(
            tracking.resolve_uri("runs"),
            name=name,
            checkpoint_dir=directory,
            schedules=models.schedules_of(run.url),
            scores=scores,
            run_id=run.mlflow_run,
            tags=tags,
        )
    return name, registered


def _name(options: RegisterOptions, run: runs.Run) -> str:
    return options.name or f"bcm-{run.config['dataset']}"


def _scores(run: runs.Run) -> dict[str, float]:
    path = storage.join(run.url, SCORES)
    if not storage.exists(path):
        raise ConfigError(f"run {run.name} has no scores yet; first run `python -m pipelines.evaluate {run.url}`.")
    return storage.read_json(path)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(RegisterOptions, argv, "register")
    if options.dry_run:
        run = runs.read_run(storage.absolute(options.run))
        print(f"would register {runs.latest_checkpoint(run.url)} as {_name(options, run)} with {_scores(run)}")
        return
    name, registered = register(options)
    print(f"{name} version {registered.version}: {registered.reason}")


if __name__ == "__main__":
    run_command(main)
