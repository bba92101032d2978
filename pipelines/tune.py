"""`python -m pipelines.tune MODEL`: search the time steps of sampling and inversion with Ray Tune."""

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bcm.inference import SCHEDULES, Toolkit, check_task, paper_schedules
from bcm.timesteps import PAPER_CIFAR10, TimeSteps, to_dict
from cluster import session
from data import store
from data.cache import cached_split, default_cache_dir
from pipelines.cli import Positional, parse, run_command
from pipelines.errors import ConfigError, nearest
from pipelines.evaluate import check_tracked, fitting_manifest
from pipelines.evaluation.scoring import images_of, moments_of
from pipelines.models import source as models
from pipelines.tracking import client as tracking
from pipelines.training import run as runs
from pipelines.tuning.trials import FRESH_SEEDS, Trials, decode, encode, score, space, trial

if TYPE_CHECKING:
    from ray.tune import Stopper


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Search time steps on a frozen model: sampling by Frechet distance, inversion by reconstruction error."""

    model: Positional
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


DEFAULT_TARGETS = ("sample-2", "sample-3", "invert-2")


@dataclass(frozen=True)
class Found:
    """The outcome for one target; scores are on the same fresh noise."""

    target: str
    trials: int
    paper: float
    """Score of the paper's schedule."""
    best: float
    """Score of the best trial's schedule."""
    steps: TimeSteps
    """The better of the two."""


def search(target: str, shared: Trials, options: TuneOptions, folder: str) -> Found:
    """Search one target; the winner and the paper's schedule are scored again on fresh noise."""
    import ray
    from optuna.samplers import TPESampler
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    paper = paper_schedules(shared.toolkit.network)[target]
    arrow, path = store.arrow_filesystem(folder)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, trials=shared, steps=paper), {"CPU": 1}),
        param_space={name: tune.uniform(*limits) for name, limits in space(paper).items()},
        tune_config=tune.TuneConfig(
            metric="score",
            mode="min",
            search_alg=OptunaSearch(points_to_evaluate=[encode(paper)], sampler=TPESampler(seed=options.seed)),
            num_samples=options.trials,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=target, storage_path=path, storage_filesystem=arrow, verbose=0, stop=_out_of_time(options.seconds)
        ),
    )
    results = [result for result in tuner.fit() if result.metrics and "score" in result.metrics]
    if not results:
        raise ConfigError(f"no trial of {target} finished; the errors stand in {folder}/{target}.")
    best = decode(paper, min(results, key=lambda result: result.metrics["score"]).config)  # type: ignore[index]
    rescore = ray.remote(score)
    fresh: list[float] = ray.get([rescore.remote(shared, steps, FRESH_SEEDS) for steps in (paper, best)])
    return Found(target, len(results), fresh[0], fresh[1], best if fresh[1] < fresh[0] else paper)


def _out_of_time(seconds: float) -> "Stopper":
    """Stops a search `seconds` after its first result: starting Ray's workers does not count, and one trial ends."""
    from ray.tune import Stopper

    class OutOfTime(Stopper):
        until = math.inf

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            self.until = min(self.until, time.monotonic() + seconds)
            return False

        def stop_all(self) -> bool:
            return time.monotonic() > self.until

    return OutOfTime()


def _quiet() -> None:
    """Keep the searches' own tables and logs off the terminal."""
    import optuna

    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # Its handler takes a Ctrl-C for the wish to stop this search and go on with what follows.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def targets_of(options: TuneOptions, toolkit: Toolkit) -> tuple[str, ...]:
    """What to search for this model: the targets asked for, or those of the default ones that it has."""
    published = paper_schedules(toolkit.network)
    for target in options.targets:
        check_task(toolkit, "invert" if target.startswith("invert") else "sample")
        if target not in published:
            raise ConfigError(f"this model has no target '{target}': {nearest(target, list(published))}")
    return options.targets or tuple(target for target in DEFAULT_TARGETS if target in published)


def opened(options: TuneOptions) -> tuple[runs.Run, Toolkit]:
    """The run and its model; whatever is wrong with them, their data or MLflow shows here."""
    if options.model.startswith(models.REGISTERED):
        raise ConfigError(f"{options.model} is registered already; give the URL of the run it came from.")
    if models.is_imported(options.model):
        raise ConfigError(
            f"{options.model} was imported, and there is no run to search on. Its time steps stand in "
            f"{store.join(options.model, SCHEDULES)} and may be changed there."
        )
    run = runs.read_run(store.absolute(options.model))
    toolkit = models.open_model(run.url)
    check_task(toolkit, "sample")
    fitting_manifest(toolkit, run.data)
    check_tracked(run)
    return run, toolkit


def shared_by_trials(run: runs.Run, toolkit: Toolkit, samples: int) -> Trials:
    """What the trials of every target share."""
    cached = cached_split(run.data, fitting_manifest(toolkit, run.data), "train", default_cache_dir())
    count = min(samples, len(cached.labels))
    return Trials(
        toolkit=toolkit,
        train=moments_of(cached),
        x=images_of(cached, 0, count),
        labels=tuple(cached.labels[:count].tolist()),
        samples=samples,
    )


def tune_model(options: TuneOptions) -> list[Found]:
    """The whole command, for a caller that stands in a `cluster.session.connect`."""
    run, toolkit = opened(options)
    return search_all(run, shared_by_trials(run, toolkit, options.samples), options)


def search_all(run: runs.Run, shared: Trials, options: TuneOptions) -> list[Found]:
    """Search every target and store the time steps with the run; must stand in a `cluster.session.connect`."""
    _quiet()
    folder = store.join(run.url, "tune", f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
    found = [search(target, shared, options, folder) for target in targets_of(options, shared.toolkit)]
    models.store_schedules(run.url, {each.target: each.steps for each in found})
    _log(run, found, options)
    return found


def _log(run: runs.Run, found: Sequence[Found], options: TuneOptions) -> None:
    uri = tracking.resolve_uri("runs")
    scores = {f"{kind}_{each.target}": getattr(each, kind) for each in found for kind in ("paper", "best")}
    targets = tuple(each.target for each in found)
    params: dict[str, Any] = {**asdict(options), "model": run.url, "targets": targets}
    run_id = tracking.start_run(
        uri, experiment="bcm-tune", name=f"tune-{run.name}", params=params, tags={"mlflow.parentRunId": run.mlflow_run}
    )
    tracking.log_scores(uri, run_id, scores)
    tracking.log_json(uri, run_id, "schedules.json", {each.target: to_dict(each.steps) for each in found})
    tracking.finish_run(uri, run_id, "FINISHED")


def table(found: Sequence[Found]) -> str:
    """The outcomes for people."""
    lines = [f"{'target':9}  {'trials':>6}  {'paper':>8}  {'found':>8}  time steps kept"]
    for each in found:
        kept = {name: value for name, value in to_dict(each.steps).items() if name not in ("kind", "t_min")}
        shown = "  ".join(f"{name} {' '.join(f'{v:.3g}' for v in value)}" for name, value in kept.items())
        lines.append(f"{each.target:9}  {each.trials:>6}  {each.paper:8.5f}  {each.best:8.5f}  {shown}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(TuneOptions, argv, "tune")
    run, toolkit = opened(options)
    targets = targets_of(options, toolkit)
    if options.dry_run:
        for target in targets:
            searched = space(paper_schedules(toolkit.network)[target])
            print(f"{target}: {', '.join(searched)}; now {to_dict(toolkit.schedules[target])}")
        return
    shared = shared_by_trials(run, toolkit, options.samples)
    with session.connect(worker_logs=False):
        print(table(search_all(run, shared, options)))


if __name__ == "__main__":
    run_command(main)
