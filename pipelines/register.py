"""`python -m pipelines.register RUN`: put a scored model, with its schedules and scores, into the MLflow registry."""

from collections.abc import Sequence
from dataclasses import dataclass

from bcm.timesteps import TimeSteps
from data import store
from pipelines.cli import Positional, parse, run_command
from pipelines.errors import ConfigError
from pipelines.evaluate import stored_scores
from pipelines.models import source as models
from pipelines.tracking import client as tracking
from pipelines.tracking import registry
from pipelines.tracking.registry import Registered
from pipelines.training import run as runs


@dataclass(frozen=True, kw_only=True)
class RegisterOptions:
    """Register the model of an evaluated run, or an imported one; it becomes the champion if its scores are better."""

    run: Positional
    """URL of the run, or of the imported model."""
    name: str | None = None
    """Name of the registered model; by default bcm-RECIPE, and needed by an imported model."""
    ema_rate: float | None = None
    """Which average of the weights to register, as given to evaluate; by default the first, which serves."""
    dry_run: bool = False
    """Print what would be registered and stop."""


@dataclass(frozen=True)
class Candidate:
    """What is to be registered."""

    run: runs.Run | None
    """None for an imported model."""
    name: str
    checkpoint: str
    schedules: dict[str, TimeSteps]
    scores: dict[str, float]

    @property
    def tags(self) -> dict[str, str]:
        """Where the version comes from."""
        if self.run is None:
            return {"imported": self.checkpoint}
        run = self.run
        return {"run": run.name, "run_url": run.url, "code": run.code, "manifest_sha256": run.manifest_sha256}


def candidate(options: RegisterOptions) -> Candidate:
    """The imported model, or the newest checkpoint of the run, with the scores measured on it."""
    url = store.absolute(options.run).rstrip("/")
    run = None if models.is_imported(url) else runs.read_run(url)
    checkpoint = url if run is None else runs.latest_checkpoint(url)
    k, network = models.stated(checkpoint)
    schedules = models.schedules_of(url, network)
    scores = stored_scores(url, k, schedules, options.ema_rate)
    name = options.name or (f"bcm-{run.config['recipe']}" if run else None)
    if name is None:
        raise ConfigError(f"{url} was imported and has no recipe to be named after; give --name.")
    return Candidate(run, name, checkpoint, schedules, scores)


def register(options: RegisterOptions) -> tuple[str, Registered]:
    """Register; the model's name and its new version."""
    found = candidate(options)
    with runs.local_checkpoint(found.checkpoint) as directory:
        registered = registry.register(
            tracking.resolve_uri("runs"),
            name=found.name,
            checkpoint_dir=directory,
            ema_rate=options.ema_rate,
            schedules=found.schedules,
            scores=found.scores,
            run_id=found.run.mlflow_run if found.run else None,
            tags=found.tags,
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
