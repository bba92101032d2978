"""`python -m pipelines.register RUN`: put a run's model, with its schedules and scores, into the MLflow registry."""

from collections.abc import Sequence
from dataclasses import dataclass

from bcm.timesteps import TimeSteps
from data import storage
from pipelines import models, registry, runs, tracking
from pipelines.config import Positional, parse, run_command
from pipelines.evaluate import stored_scores
from pipelines.registry import Registered


@dataclass(frozen=True, kw_only=True)
class RegisterOptions:
    """Register the model of an evaluated run; it becomes the champion if its scores are better."""

    run: Positional
    """URL of the run."""
    name: str | None = None
    """Name of the registered model; by default bcm-RECIPE."""
    dry_run: bool = False
    """Print what would be registered and stop."""


@dataclass(frozen=True)
class Candidate:
    """What is to be registered."""

    run: runs.Run
    name: str
    checkpoint: str
    schedules: dict[str, TimeSteps]
    scores: dict[str, float]


def candidate(options: RegisterOptions) -> Candidate:
    """The newest checkpoint of the run, with the scores measured on it."""
    run = runs.read_run(storage.absolute(options.run))
    checkpoint, schedules = runs.latest_checkpoint(run.url), models.schedules_of(run.url)
    scores = stored_scores(run, runs.step_of(checkpoint), schedules)
    return Candidate(run, options.name or f"bcm-{run.config['recipe']}", checkpoint, schedules, scores)


def register(options: RegisterOptions) -> tuple[str, Registered]:
    """Register; the model's name and its new version."""
    found = candidate(options)
    run = found.run
    tags = {"run": run.name, "run_url": run.url, "code": run.code, "manifest_sha256": run.manifest_sha256}
    with runs.local_checkpoint(found.checkpoint) as directory:
        registered = registry.register(
            tracking.resolve_uri("runs"),
            name=found.name,
            checkpoint_dir=directory,
            schedules=found.schedules,
            scores=found.scores,
            run_id=run.mlflow_run,
            tags=tags,
        )
    return found.name, registered


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(RegisterOptions, argv, "register")
    if options.dry_run:
        found = candidate(options)
        print(f"would register {found.checkpoint} as {found.name} with {found.scores}")
        return
    name, registered = register(options)
    print(f"{name} version {registered.version}: {registered.reason}")


if __name__ == "__main__":
    run_command(main)
