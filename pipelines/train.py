"""`python -m pipelines.train RECIPE`: training on Ray, from shards to checkpoints."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bcm.checkpoint import load_checkpoint, verify_files
from bcm.networks import build_network
from bcm.precond import BCM
from bcm.types import BCMError
from cluster import options as scaling
from cluster import session
from data import store
from data.cache import BUDGET_VARIABLE, CACHE_VARIABLE, default_cache_dir, open_split
from data.manifest import Manifest, check_shards, load_manifest
from pipelines.cli import ConfigOptions, parse, run_command
from pipelines.config import Config
from pipelines.errors import ConfigError, TrackingError
from pipelines.recipes import RECIPES, recipe
from pipelines.tracking import client as tracking
from pipelines.training import run as runs
from pipelines.training.describe import describe
from pipelines.training.progress import Board, shown
from pipelines.training.worker import Job, train_worker

if TYPE_CHECKING:
    from ray.train import Checkpoint


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a model on Ray Train: with bidirectional consistency training (Algorithm 1), or the recipe's objective."""

    config: ConfigOptions
    """The recipe's config, with every field an option."""
    storage: str = "runs"
    """URL of the folder for runs: a local path, s3://..., or any other fsspec URL."""
    data: str | None = None
    """URL of the shards made by pipelines.prepare; by default STORAGE/data/DATASET."""
    resume: str | None = None
    """Name of a run in STORAGE to continue from its last checkpoint, with the options it was started with."""
    experiment: str = "bcm"
    """MLflow experiment. MLflow is where MLFLOW_TRACKING_URI says, by default runs/mlflow.db here."""
    dry_run: bool = False
    """Print the config, the stages and the size of the network, and start nothing."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training whose every foreseeable obstacle has been looked for, and which has left no trace yet."""

    options: TrainOptions
    storage: str
    data: str
    manifest: Manifest
    uri: str
    resumed: runs.Run | None
    """The run to go on with; None for a new one."""
    fallback: str | None
    """URL of the checkpoint to go on from where Ray's record of them is lost."""
    initial: runs.Initial | None
    """The trained model that a new run starts from; None for random weights."""


def plan(options: TrainOptions, initial: runs.Initial | None = None) -> Plan:
    """Check data, storage, MLflow and the run to resume; needs no Ray."""
    config = options.config
    if config.finetunes and initial is None and options.resume is None:
        raise ConfigError(
            f"recipe {config.recipe} starts from a trained network of one time: "
            f"python -m pipelines.finetune {config.recipe} --init URL"
        )
    run_storage = runs.durable(options.storage, "--storage")
    data = runs.durable(options.data or store.join(run_storage, "data", config.dataset), "--data")
    manifest = load_manifest(data)
    _check_data(config, manifest, data)
    check_shards(data, manifest)
    if not session.is_given():
        open_split(data, manifest, "train", default_cache_dir()).wait()
    resumed, fallback = None, None
    if options.resume is not None:
        resumed, fallback = _resumed(options.resume, config, run_storage, data, manifest)
    store.check_writable(run_storage)
    uri = tracking.resolve_uri("runs")
    tracking.connect(uri)
    return Plan(
        options=options,
        storage=run_storage,
        data=data,
        manifest=manifest,
        uri=uri,
        resumed=resumed,
        fallback=fallback,
        initial=initial,
    )


def start(plan: Plan) -> runs.Run:
    """Run a planned training to its end; must stand in a `cluster.session.connect`."""
    config = plan.options.config
    scaling.check_resources(config.scaling)
    _check_tracking(plan.uri)
    if plan.resumed:
        run = plan.resumed
        tracking.continue_run(plan.uri, run.mlflow_run)
        runs.forget_damaged_record(run.url)
    else:
        run = _new_run(plan)
    ending = "FAILED"
    try:
        print(f"run {run.url}\nMLflow run {run.mlflow_run} at {tracking.redacted(plan.uri)}", flush=True)
        _fit(plan, run)
        ending = "FINISHED"
    except KeyboardInterrupt:
        ending = "KILLED"
        raise
    finally:
        _finish(plan.uri, run, ending)
    return run


def train(options: TrainOptions) -> runs.Run:
    """Plan and run a training; must stand in a `cluster.session.connect`."""
    return start(plan(options))


def _check_data(config: Config, manifest: Manifest, data: str) -> None:
    network = config.network
    wanted = (config.dataset, network.resolution, network.image_channels)
    found = (manifest.name, manifest.resolution, manifest.channels)
    if wanted != found:
        raise ConfigError(
            f"recipe {config.recipe} trains on {wanted[0]} ({wanted[1]} px, {wanted[2]} channels), but {data} holds "
            f"{found[0]} ({found[1]} px, {found[2]} channels). Give --data, or the network options that fit."
        )
    if network.classes not in (0, len(manifest.class_names)):
        raise ConfigError(f"network.classes is {network.classes}, but {data} has {len(manifest.class_names)} classes.")


def _check_tracking(uri: str) -> None:
    import ray

    several = len([node for node in ray.nodes() if node["Alive"]]) > 1
    if tracking.is_local(uri) and (several or session.in_job()):
        raise ConfigError(
            f"the MLflow store {uri} is a file of this machine, out of reach for a job or for other nodes. "
            "Set MLFLOW_TRACKING_URI to an MLflow server, in the environment of the cluster."
        )


def _resumed(name: str, config: Config, run_storage: str, data: str, manifest: Manifest) -> tuple[runs.Run, str | None]:
    """The record of the run to resume, and its newest checkpoint, which has been read to its last byte.

    Ray's own record of the checkpoints decides which are whole. Where a kill has lost it, the newest that can be read
    is taken, for the one being stored at that moment may be half there.
    """
    run = replace(runs.read_run(store.join(run_storage, name)), storage=run_storage, data=data)
    runs.check_same(run, config, manifest.sha256)
    names = runs.checkpoints(run.url)
    if runs.committed(run.url) is None:
        whole = [name for name in names if _is_whole(store.join(run.url, name))]
        if whole and whole != names:
            print(f"warning: passing over checkpoints that are not whole: {', '.join(sorted({*names} - {*whole}))}")
        names = whole or names
    if not names:
        return run, None
    url = store.join(run.url, names[-1])
    with runs.local_checkpoint(url) as directory:
        load_checkpoint(directory, runs.idle_state(BCM(build_network(config.network)), config), config.network)
    return run, url


def _is_whole(url: str) -> bool:
    try:
        with runs.local_checkpoint(url) as directory:
            verify_files(directory)
    except BCMError:
        return False
    return True


def _new_run(plan: Plan) -> runs.Run:
    """The record of a new run, in MLflow and in storage."""
    config, digest = plan.options.config, plan.manifest.sha256
    name, code = runs.new_name(config.recipe), runs.code_version()
    tags = {"code": code, "manifest_sha256": digest, "run": name, "recipe": config.recipe}
    init, init_sha256 = (plan.initial.source, plan.initial.sha256) if plan.initial else ("", "")
    params = {**runs.describe(config), "data": plan.data, "storage": plan.storage}
    params |= {"init": init, "init_sha256": init_sha256} if init else {}
    run_id = tracking.start_run(plan.uri, experiment=plan.options.experiment, name=name, params=params, tags=tags)
    run = runs.Run(
        name=name,
        storage=plan.storage,
        data=plan.data,
        manifest_sha256=digest,
        mlflow_run=run_id,
        code=code,
        config=config.to_dict(),
        init=init,
        init_sha256=init_sha256,
    )
    try:
        if plan.initial:
            runs.store_first_checkpoint(run, config, plan.initial.model)
        runs.write_run(run)
    except BaseException:
        tracking.finish_run(plan.uri, run_id, "FAILED")
        raise
    return run


def _fit(plan: Plan, run: runs.Run) -> None:
    from ray.train.torch import TorchTrainer

    config, board = plan.options.config, Board()
    job = Job(
        config=config,
        run=run,
        manifest=plan.manifest,
        tracking_uri=plan.uri,
        board=board,
        fallback=_checkpoint_at(plan.fallback or run.first_checkpoint),
    )
    arrow, path = store.arrow_filesystem(run.storage)
    worker_env = {name: os.environ[name] for name in (CACHE_VARIABLE, BUDGET_VARIABLE) if name in os.environ}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=scaling.scaling_config(config.scaling),
        run_config=scaling.run_config(
            config.scaling, name=run.name, storage_path=path, storage_filesystem=arrow, worker_env=worker_env
        ),
    )
    with shown(board, config.train.batch_size):
        scaling.fit(trainer)
    seen = board.read()
    if seen.failure:
        raise ConfigError(seen.failure)
    if seen.warning:
        print(f"warning: {seen.warning}", file=sys.stderr)


def _checkpoint_at(url: str | None) -> "Checkpoint | None":
    from ray.train import Checkpoint

    if url is None:
        return None
    filesystem, path = store.arrow_filesystem(url)
    return Checkpoint(path, filesystem)


def _finish(uri: str, run: runs.Run, ending: Any) -> None:
    try:
        tracking.finish_run(uri, run.mlflow_run, ending)
    except TrackingError as error:
        print(f"warning: {error}\nSend what is missing later: --resume {run.name}", file=sys.stderr)


def chosen_recipe(argv: Sequence[str], module: str, recipes: Mapping[str, Callable[[], Config]]) -> str | None:
    """The recipe that a command line begins with; None if it asks for help, which is given then."""
    usage = f"python -m pipelines.{module} RECIPE [options]"
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {usage}; RECIPE --help lists the options.\n\nRecipes:")
        print("\n".join(f"  {name:26s} {(make.__doc__ or '').splitlines()[0]}" for name, make in recipes.items()))
        return None
    if argv[0].startswith("-"):
        raise ConfigError(f"the recipe comes before {argv[0]}: {usage}.")
    return argv[0]


def carry_out(options: TrainOptions, initial: runs.Initial | None = None) -> None:
    """Describe a training, or plan it and run it on a Ray of its own or the one that is given."""
    if options.dry_run:
        print(describe(options.config))
        return
    planned = plan(options, initial)
    with session.connect(worker_logs=session.is_given()):
        run = start(planned)
    print(f"done: {run.url}")


def main(argv: Sequence[str]) -> None:
    """The command line."""
    if (name := chosen_recipe(argv, "train", RECIPES)) is not None:
        carry_out(parse(TrainOptions, argv[1:], f"train {name}", TrainOptions(config=recipe(name))))


if __name__ == "__main__":
    run_command(main)
