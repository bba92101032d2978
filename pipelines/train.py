"""`python -m pipelines.train RECIPE`: training on Ray, from shards to checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster import session
from data import store
from data.manifest import load_manifest
from pipelines.cli import ConfigOptions, command_line, durable, parse, run_command
from pipelines.errors import ConfigError
from pipelines.recipes import OWN_IMAGES, RECIPES, recipe
from pipelines.training.checks import Training, checked, open_initial
from pipelines.training.describe import describe
from pipelines.training.launch import launch


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a model on Ray Train: with bidirectional consistency training (Algorithm 1), or the recipe's objective."""

    config: ConfigOptions
    """The recipe's config, with every field an option."""
    storage: str = "runs"
    """URL of the folder for runs: a local path, s3://..., or any other fsspec URL."""
    data: str | None = None
    """URL of the shards made by pipelines.prepare; by default STORAGE/data/DATASET."""
    init: str | None = None
    """A trained consistency model (iCT) to make bidirectional (Section 3.2): URL of a run or a checkpoint, or
    models:/NAME@ALIAS. Needed by the recipes that fine-tune."""
    init_ema_rate: float | None = None
    """Which average of its weights to start from, if it kept several; by default the first, which serves."""
    resume: str | None = None
    """A run to continue from its last checkpoint, with the options it was started with: its name in STORAGE, or its
    URL, which says STORAGE too."""
    smoke: bool = False
    """Cut the recipe to a few steps of a narrower network on two CPUs: every part works, nothing is learnt."""
    experiment: str = "bcm"
    """MLflow experiment. MLflow is where MLFLOW_TRACKING_URI says, by default runs/mlflow.db here."""
    dry_run: bool = False
    """Print the config, the stages and the size of the network, and start nothing."""


def data_of(options: TrainOptions) -> str:
    """Where the shards are."""
    storage = durable(options.storage, "--storage")
    return durable(options.data or store.join(storage, "data", options.config.dataset), "--data")


def check(options: TrainOptions) -> Training:
    """Look for everything that could stand in the way, before Ray starts."""
    if options.init is not None and options.resume is not None:
        raise ConfigError("--resume goes on with what the run was started from; leave --init out.")
    config, storage, resume = options.config, durable(options.storage, "--storage"), options.resume
    if resume is not None and "/" in resume.rstrip("/"):
        storage, _, resume = durable(resume, "--resume").rpartition("/")
    return checked(
        config,
        storage=storage,
        data=data_of(replace(options, storage=storage)),
        resume=resume,
        experiment=options.experiment,
        initial=None if options.init is None else open_initial(options.init, config, options.init_ema_rate),
    )


def main(argv: Sequence[str]) -> None:
    """The command line."""
    usage = f"{command_line('pipelines.train')} RECIPE [options]"
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {usage}; RECIPE --help lists the options.\n\nRecipes:")
        print("\n".join(f"  {name:26s} {(make.__doc__ or '').splitlines()[0]}" for name, make in RECIPES.items()))
        print("\n--smoke cuts any of them to a few steps; those that fine-tune need --init MODEL.")
        return
    if argv[0].startswith("-"):
        raise ConfigError(f"the recipe comes before {argv[0]}: {usage}.")
    name, smoke = argv[0], "--smoke" in argv
    options = parse(TrainOptions, argv[1:], f"train {name}", TrainOptions(config=recipe(name, smoke)))
    if name == OWN_IMAGES:
        place = data_of(options)
        fitting = TrainOptions(config=recipe(name, smoke, load_manifest(place)))
        options = replace(parse(TrainOptions, argv[1:], f"train {name}", fitting), data=place)
    if options.dry_run:
        print(describe(options.config))
        return
    training = check(options)
    with session.connect(worker_logs=session.is_given()):
        run = launch(training)
    print(f"done: {run.url}")


if __name__ == "__main__":
    run_command(main)
