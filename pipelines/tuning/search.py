"""The search for time steps with Ray Tune: what is searched, the trials, and what is kept of them."""

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bcm import strict
from bcm.inference import SCHEDULES, Toolkit, check_task
from bcm.timesteps import TimeSteps
from data import store
from data.cache import ShardCache
from data.manifest import Manifest
from pipelines.errors import ConfigError, nearest
from pipelines.evaluation.features import as_images
from pipelines.evaluation.reference import manifest_for, moments_of
from pipelines.models.run import Run
from pipelines.models.source import model_at, store_schedules
from pipelines.tracking import client
from pipelines.tuning.space import decode, encode, space
from pipelines.tuning.trials import FRESH_SEEDS, Trials, score, trial

if TYPE_CHECKING:
    from ray.tune import Stopper

DEFAULT_TARGETS = ("sample-2", "sample-3", "invert-2")
"""What is searched, as far as a model has it, where nothing is named."""


@dataclass(frozen=True)
class Outcome:
    """The outcome for one target; scores are on the same fresh noise."""

    target: str
    trials: int
    paper: float
    """Score of the published time steps."""
    best: float
    """Score of the best trial's time steps."""
    steps: TimeSteps
    """The better of the two."""


def searchable(source: str) -> tuple[Run, Toolkit, Manifest]:
    """The run at the URL `source`, its model and its data; whatever is wrong with them or with MLflow shows here."""
    model = model_at(source)
    if model.run is None:
        hint = (
            "Its time steps stand there and may be changed." if model.home else "Give the URL of the run it came from."
        )
        raise ConfigError(f"{source} is no training run, and there is none to search on. {hint}.")
    toolkit = model.open()
    check_task(toolkit, "sample")
    manifest = manifest_for(toolkit.network, model.run.data)
    client.check_run(client.resolve_uri("runs"), model.run.mlflow_run, model.run.name)
    return model.run, toolkit, manifest


def targets_of(run: Run, toolkit: Toolkit, names: Sequence[str] = ()) -> dict[str, TimeSteps]:
    """The published time steps of what is searched: of the targets named, or of the default ones the model has."""
    published = run.schedules
    for name in names:
        check_task(toolkit, "invert" if name.startswith("invert") else "sample")
        if name not in published:
            raise ConfigError(f"this model has no target '{name}': {nearest(name, list(published))}")
    return {name: published[name] for name in names or DEFAULT_TARGETS if name in published}


def load_trials(run: Run, toolkit: Toolkit, manifest: Manifest, samples: int) -> Trials:
    """What the trials of every target share: the model, and the run's training images."""
    cache = ShardCache(run.data, manifest, "train")
    images, labels = cache.take(np.arange(min(samples, len(cache))))
    return Trials(
        toolkit=toolkit,
        train=moments_of(cache),
        x=as_images(images),
        labels=tuple(labels.tolist()),
        samples=samples,
    )


def search(
    run: Run, shared: Trials, targets: Mapping[str, TimeSteps], *, seconds: float, trials: int, seed: int
) -> list[Outcome]:
    """Search every target and keep the time steps with the run; must stand in a `cluster.session.connect`.

    Args:
        run: the run whose model is searched on.
        shared: what the trials share.
        targets: the published time steps by target; the first trial of each.
        seconds: time to search each target, from its first result on.
        trials: most trials for each target.
        seed: seed of the search.
    """
    import optuna

    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # Its handler takes a Ctrl-C for the wish to stop this search and go on with what follows.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    folder = store.join(run.url, "tune", time.strftime("%Y%m%d-%H%M%S", time.gmtime()))
    outcomes = [_search(name, steps, shared, folder, seconds, trials, seed) for name, steps in targets.items()]
    store_schedules(run.url, {outcome.target: outcome.steps for outcome in outcomes})

    uri = client.resolve_uri("runs")
    params = {"model": run.url, "targets": tuple(targets), "samples": shared.samples}
    params |= {"seconds": seconds, "trials": trials, "seed": seed}
    run_id = client.start_run(
        uri, experiment="bcm-tune", name=f"tune-{run.name}", params=params, tags={"mlflow.parentRunId": run.mlflow_run}
    )
    scores = {f"{kind}_{each.target}": getattr(each, kind) for each in outcomes for kind in ("paper", "best")}
    client.log_scores(uri, run_id, scores)
    client.log_json(uri, run_id, SCHEDULES, {each.target: strict.dump(each.steps) for each in outcomes})
    client.finish_run(uri, run_id, "FINISHED")
    return outcomes


def _search(
    target: str, paper: TimeSteps, shared: Trials, folder: str, seconds: float, trials: int, seed: int
) -> Outcome:
    """Search one target; the winner and the published time steps are scored again on fresh noise."""
    import ray
    from optuna.samplers import TPESampler
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    filesystem, path = store.arrow_filesystem(folder)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, trials=shared, steps=paper), {"CPU": 1}),
        param_space={name: tune.uniform(*limits) for name, limits in space(paper).items()},
        tune_config=tune.TuneConfig(
            metric="score",
            mode="min",
            search_alg=OptunaSearch(points_to_evaluate=[encode(paper)], sampler=TPESampler(seed=seed)),
            num_samples=trials,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=target, storage_path=path, storage_filesystem=filesystem, verbose=0, stop=_out_of_time(seconds)
        ),
    )
    results = [result for result in tuner.fit() if result.metrics and "score" in result.metrics]
    if not results:
        raise ConfigError(f"no trial of {target} finished; the errors stand in {folder}/{target}.")
    best = decode(paper, min(results, key=lambda result: result.metrics["score"]).config)  # type: ignore[index]
    rescore = ray.remote(num_cpus=1)(score)
    of_paper, of_best = ray.get([rescore.remote(shared, steps, FRESH_SEEDS) for steps in (paper, best)])
    return Outcome(target, len(results), of_paper, of_best, best if of_best < of_paper else paper)


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


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes for people."""
    lines = [f"{'target':9}  {'trials':>6}  {'paper':>8}  {'found':>8}  time steps kept"]
    for each in outcomes:
        kept = {name: value for name, value in strict.dump(each.steps).items() if name not in ("kind", "t_min")}
        shown = "  ".join(f"{name} {' '.join(f'{v:.3g}' for v in value)}" for name, value in kept.items())
        lines.append(f"{each.target:9}  {each.trials:>6}  {each.paper:8.5f}  {each.best:8.5f}  {shown}")
    return "\n".join(lines)
