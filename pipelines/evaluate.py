"""`python -m pipelines.evaluate MODEL`: scores of a model on held-out images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bcm.inference import Toolkit, check_task
from bcm.timesteps import TimeSteps, from_dict, to_dict
from cluster import session
from data import store
from data.cache import cached_split, default_cache_dir
from data.manifest import Manifest, check_shards, load_manifest
from pipelines.cli import Positional, parse, run_command
from pipelines.errors import ConfigError
from pipelines.evaluation import scoring
from pipelines.models import source as models
from pipelines.tracking import client as tracking
from pipelines.training import run as runs

SCORES = "scores.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure a model: Frechet distance of its samples, and error and kept labels of its reconstructions.

    The distance is one of pixels, not FID; images larger than CIFAR-10's are averaged down to that size for it.
    """

    model: Positional
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


def data_of(model: str, data: str | None) -> str:
    """The URL given, or that of the data the run was trained on."""
    if data:
        return store.absolute(data)
    if run := models.run_of(model):
        return run.data
    raise ConfigError(f"{model} does not say where its data is; give --data.")


def fitting_manifest(toolkit: Toolkit, data: str) -> Manifest:
    """The manifest of the data at `data`, which must be whole and of the shape of the model's images."""
    manifest, network = load_manifest(data), toolkit.network
    if (manifest.resolution, manifest.channels) != (network.resolution, network.image_channels):
        raise ConfigError(
            f"the model makes images of {network.resolution} px and {network.image_channels} channels, but {data} "
            f"holds {manifest.resolution} px and {manifest.channels} channels. Give --data that fits."
        )
    if network.classes not in (0, len(manifest.class_names)):
        raise ConfigError(
            f"the model knows {network.classes} classes, but {data} has {len(manifest.class_names)}. "
            "Give --data that fits."
        )
    check_shards(data, manifest)
    return manifest


def check_tracked(run: runs.Run) -> None:
    """Refuse, before the work starts, an MLflow that is down or does not know the run."""
    uri = tracking.resolve_uri("runs")
    client = tracking.connect(uri)
    with tracking.reported(uri, f"the run {run.mlflow_run} of {run.name} cannot be found"):
        client.get_run(run.mlflow_run)


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    toolkit: Toolkit
    data: str
    manifest: Manifest
    home: str | None
    """URL of the folder that the scores are stored in; None for a registered model."""
    run: runs.Run | None
    """The run that the scores are logged to; None for a registered or imported model."""


def subject(options: EvaluateOptions) -> Subject:
    """Find what is to be measured; whatever is wrong with it shows here, before the work starts."""
    data = data_of(options.model, options.data)
    run = models.run_of(options.model)
    home = None if options.model.startswith(models.REGISTERED) else models.home_of(options.model)
    toolkit = models.open_model(options.model, ema_rate=options.ema_rate)
    check_task(toolkit, "sample")
    manifest = fitting_manifest(toolkit, data)
    if run:
        check_tracked(run)
    return Subject(toolkit, data, manifest, home, run)


def table(scores: Mapping[str, float]) -> str:
    """The scores as a table for people."""
    lines = [f"{'NFE':>4}  {'Frechet':>8}  {'/ test':>6}  {'MSE':>7}  {'labels kept':>11}"]
    lines.append(f"{'test':>4}  {scores['frechet_test']:8.4f}  {1:6.2f}  {'':7}  {'':11}")
    for nfe in sorted({int(name.rpartition("nfe")[2]) for name in scores if "nfe" in name}):
        cells = [f"{nfe:>4}"]
        for name, form, width in (
            ("frechet", "8.4f", 8),
            ("frechet_ratio", "6.2f", 6),
            ("mse", "7.5f", 7),
            ("labels_kept", "11.1%", 11),
        ):
            value = scores.get(f"{name}_nfe{nfe}")
            cells.append(" " * width if value is None else f"{value:{form}}")
        lines.append("  ".join(cells))
    return "\n".join(lines)


def real_images(found: Subject) -> scoring.Held:
    """The held-out images and the moments of the training images."""
    cache = default_cache_dir()
    train, test = (cached_split(found.data, found.manifest, split, cache) for split in ("train", "test"))
    return scoring.held(train, test)


def measure(found: Subject, real: scoring.Held, options: EvaluateOptions) -> dict[str, float]:
    """Score the model, store the scores beside it, log them to its run; must stand in a `cluster.session.connect`."""
    toolkit = found.toolkit
    scores = scoring.score_model(toolkit, real, options.samples, options.images)
    if found.home:
        steps = {name: to_dict(steps) for name, steps in toolkit.schedules.items()}
        entry = {"k": toolkit.k, "ema_rate": options.ema_rate, "schedules": steps, "scores": scores}
        store.write_json(store.join(found.home, SCORES), entry)
    if found.run:
        tracking.log_scores(tracking.resolve_uri("runs"), found.run.mlflow_run, scores, toolkit.k)
    return scores


def stored_scores(
    home: str, k: int, schedules: Mapping[str, TimeSteps], ema_rate: float | None = None
) -> dict[str, float]:
    """The scores stored in a run's or model's folder.

    Those of another step, of other time steps or of another average of the weights are a `ConfigError`.
    """
    path, again = store.join(home, SCORES), f"Run `python -m pipelines.evaluate {home}`."
    name = home.rpartition("/")[2]
    if not store.exists(path):
        raise ConfigError(f"{name} has no scores yet. {again}")
    entry = store.read_json(path)
    try:
        of_k, of_rate = entry["k"], entry.get("ema_rate")
        of_schedules = {name: from_dict(steps) for name, steps in entry["schedules"].items()}
        scores = {str(name): float(score) for name, score in entry["scores"].items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}). {again}") from error
    if of_k != k:
        raise ConfigError(f"the scores of {name} are those of step {of_k}, but it is at step {k} now. {again}")
    if of_rate != ema_rate:
        which = "the average that serves" if of_rate is None else f"the average of rate {of_rate}"
        raise ConfigError(f"the scores of {name} are those of {which}; give the same --ema-rate. {again}")
    if of_schedules != schedules:
        raise ConfigError(f"the time steps of {name} have changed since it was scored. {again}")
    return scores


def evaluate(options: EvaluateOptions) -> dict[str, float]:
    """The whole command, for a caller that stands in a `cluster.session.connect`."""
    found = subject(options)
    return measure(found, real_images(found), options)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(EvaluateOptions, argv, "evaluate")
    found = subject(options)
    if options.dry_run:
        steps = ", ".join(found.toolkit.schedules)
        print(f"would measure {options.model} after {found.toolkit.k} steps with {steps} on {found.data}")
        return
    real = real_images(found)
    with session.connect(worker_logs=False):
        print(table(measure(found, real, options)))


if __name__ == "__main__":
    run_command(main)
