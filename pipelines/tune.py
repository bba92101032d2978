"""`python -m pipelines.tune RUN`: search the time steps of sampling and inversion with Ray Tune."""

from collections.abc import Sequence
from dataclasses import dataclass

from bcm import strict
from bcm.timesteps import PAPER_CIFAR10
from cluster import session
from pipelines.cli import Run, parse, run_command
from pipelines.errors import ConfigError, nearest
from pipelines.tuning.search import Outcome, load_trials, search, searchable, table, targets_of
from pipelines.tuning.space import space


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Search time steps on a frozen model: sampling by Frechet distance, inversion by reconstruction error."""

    model: Run
    """URL of the run whose model is searched on; the time steps found are stored with it."""
    targets: tuple[str, ...] = ()
    """What to search, by task and NFE; by default sample-2, sample-3 and invert-2, as far as the model has them."""
    seconds: float = 60.0
    """Time to search each target, from its first result on."""
    trials: int = 200
    """Most trials for each target; the first is the paper's schedule."""
    samples: int = 1000
    """Samples of a trial, or training images inverted by it (at most as many as there are)."""
    seed: int = 0
    """Seed of the search."""
    dry_run: bool = False
    """Print the space of each target and stop."""

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if len(set(self.targets)) < len(self.targets):
            raise ConfigError("--targets takes each target only once.")
        for target in self.targets:
            if target not in PAPER_CIFAR10:
                raise ConfigError(f"unknown target '{target}': {nearest(target, list(PAPER_CIFAR10))}")
            if not space(PAPER_CIFAR10[target]):
                raise ConfigError(f"target '{target}' has no time step to search.")
        if self.trials < 1 or self.samples < 2 or self.seconds <= 0:
            raise ConfigError("--trials must be at least 1, --samples at least 2 and --seconds positive.")


def tune(options: TuneOptions) -> list[Outcome]:
    """Search every target and keep the better time steps with the run; nothing for a dry run."""
    run, toolkit, manifest = searchable(options.model)
    targets = targets_of(run, toolkit, options.targets)
    if options.dry_run:
        for name, published in targets.items():
            print(f"{name}: {', '.join(space(published))}; now {strict.dump(toolkit.schedules[name])}")
        return []
    trials = load_trials(run, toolkit, manifest, options.samples)
    with session.connect(worker_logs=False):
        return search(run, trials, targets, seconds=options.seconds, trials=options.trials, seed=options.seed)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    if outcomes := tune(parse(TuneOptions, argv, "tune")):
        print(table(outcomes))


if __name__ == "__main__":
    run_command(main)
