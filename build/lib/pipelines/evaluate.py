"""`python -m pipelines.evaluate MODEL`: scores of a model on held-out images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from bcm.inference import Toolkit
from cluster import local
from data import storage
from data.cache import cached_split, default_cache_dir
from data.shards import check_shards, load_manifest
from pipelines import models, runs, scoring, tracking
from pipelines.config import ConfigError, parse, run_command

SCORES = "scores.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure a model: pixel Frechet distance of its samples, and error and kept labels of its reconstructions."""

    model: Annotated[str, tyro.conf.Positional]
    """models:/NAME@ALIAS, or the URL of a run or checkpoint."""
    data: str | None = None
    """URL of the shards; by default those the run was trained on."""
    samples: int = 2000
    """Samples at each NFE."""
    dry_run: bool = False
    """Check the model and the data, print what would be measured, and stop."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.samples < 2:
            raise ConfigError(f"--samples {self.samples}: a Frechet distance needs at least 2.")


def real_images(data: str) -> scoring.Held:
    """The held-out images and the moments of the training images at `data`."""
    manifest = load_manifest(data)
    check_shards(data, manifest)
    cache = default_cache_dir()
    return scoring.held(cached_split(data, manifest, "train", cache), cached_split(data, manifest, "test", cache))


def data_of(model: str, data: str | None) -> str:
    """The URL given, or that of the data the run was trained on."""
    if data:
        return storage.absolute(data)
    if model.startswith(models.REGISTERED):
        raise ConfigError(f"{model} does not say where its data is; give --data.")
    return runs.read_run(storage.absolute(model)).data


def check_fit(toolkit: Toolkit, data: str) -> None:
    """Refuse data of another shape than the model's images."""
    manifest, network = load_manifest(data), toolkit.network
    if (manifest.resolution, manifest.channels) != (network.resolution, network.image_channels):
        raise ConfigError(
            f"the model makes images of {network.resolution} px and {network.image_channels} channels, but {data} "
            f"holds {manifest.resolution} px and {manifest.channels} channels. Give --data that fits."
        )


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


def evaluate(options: EvaluateOptions) -> dict[str, float]:
    """Score the model, log to MLflow and store beside the run; must stand in a `cluster.local.session`."""
    data = data_of(options.model, options.data)
    toolkit = models.open_model(options.model)
    check_fit(toolkit, data)
    scores = scoring.score_model(toolkit, real_images(data), options.samples)
    if not options.model.startswith(models.REGISTERED):
        run = runs.read_run(storage.absolute(options.model))
        storage.write_json(storage.join(run.url, SCORES), scores)
        tracking.log_scores(tracking.resolve_uri("runs"), run.mlflow_run, scores, toolkit.k)
    return scores


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(EvaluateOptions, argv, "evaluate")
    if options.dry_run:
        data = data_of(options.model, options.data)
        toolkit = models.open_model(options.model)
        check_fit(toolkit, data)
        print(f"would measure {options.model} after {toolkit.k} steps with {', '.join(toolkit.schedules)} on {data}")
        return
    with local.session(worker_logs=False):
        print(table(evaluate(options)))


if __name__ == "__main__":
    run_command(main)
