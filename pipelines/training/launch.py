"""From a checked training to Ray Train, and what is noted of it before and after."""

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bcm import strict
from bcm.timesteps import PUBLISHED
from cluster import options, session
from data import store
from data.cache import BUDGET_VARIABLE, CACHE_VARIABLE
from pipelines.config import flatten
from pipelines.errors import ConfigError, TrackingError
from pipelines.models.checkpoints import checkpoint_name, forget_damaged_record, upload
from pipelines.models.run import Run, code_version, new_name, save_run_checkpoint, write_run
from pipelines.tracking import client
from pipelines.training.checks import Training, idle_state
from pipelines.training.progress import line_queue, shown
from pipelines.training.worker import Job, train_worker

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue


def launch(training: Training) -> Run:
    """Run a checked training to its end; must stand in a `cluster.session.connect`."""
    uri = training.tracking_uri
    _check_cluster(training)
    run = training.resumed or _begun(training)
    if training.resumed:
        forget_damaged_record(run.url)
        client.continue_run(uri, run.mlflow_run)
    ending: Any = "FAILED"
    try:
        print(f"run {run.url}\nMLflow run {run.mlflow_run} at {client.redacted(uri)}", flush=True)
        lines = line_queue()
        with shown(lines):
            unsent = options.fit(_trainer(training, run, lines)).return_value
        if unsent:
            print(
                f"warning: {unsent} points of metrics have not reached MLflow; they stand in the last checkpoint. "
                f"Send them when it answers again: --resume {run.name}",
                file=sys.stderr,
            )
        ending = "FINISHED"
    except KeyboardInterrupt:
        ending = "KILLED"
        raise
    finally:
        try:
            client.finish_run(uri, run.mlflow_run, ending)
        except TrackingError as error:
            print(f"warning: {error}\nSend what is missing later: --resume {run.name}", file=sys.stderr)
    return run


def _check_cluster(training: Training) -> None:
    """Refuse what this cluster cannot hold, and a store of MLflow that its nodes cannot reach."""
    import ray

    options.check_resources(training.config.scaling)
    several = len([node for node in ray.nodes() if node["Alive"]]) > 1
    if client.is_local(training.tracking_uri) and (several or session.in_job()):
        raise ConfigError(
            f"the MLflow store {training.tracking_uri} is a file of this machine, out of reach for a job or for other "
            "nodes. Set MLFLOW_TRACKING_URI to an MLflow server, in the environment of the cluster."
        )


def _trainer(training: Training, run: Run, lines: "Queue") -> "TorchTrainer":
    """Ray's trainer of a run; where Ray knows no checkpoint, it starts from the fallback or the initial model."""
    from ray.train import Checkpoint
    from ray.train.torch import TorchTrainer

    from pipelines.training.callbacks import FinalErrors

    scaling, fallback = training.config.scaling, None
    if url := training.fallback or (store.join(run.url, checkpoint_name(0)) if run.init else None):
        filesystem, path = store.arrow_filesystem(url)
        fallback = Checkpoint(path, filesystem)
    job = Job(run=run, manifest=training.manifest, tracking_uri=training.tracking_uri, lines=lines, fallback=fallback)
    filesystem, path = store.arrow_filesystem(run.storage)
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=options.scaling_config(scaling),
        run_config=options.run_config(
            scaling,
            name=run.name,
            storage_path=path,
            storage_filesystem=filesystem,
            worker_env={name: os.environ[name] for name in (CACHE_VARIABLE, BUDGET_VARIABLE) if name in os.environ},
            callbacks=[FinalErrors()],
        ),
    )


def _begun(training: Training) -> Run:
    """The record of a new run, in MLflow and in storage."""
    config, initial, digest = training.config, training.initial, training.manifest.sha256
    name, code = new_name(config.recipe), code_version()
    tags = {"code": code, "manifest_sha256": digest, "run": name, "recipe": config.recipe}
    init = {"init": initial.source, "init_sha256": initial.sha256} if initial else {}
    params = {**flatten(strict.dump(config)), "data": training.data, "storage": training.storage, **init}
    uri = training.tracking_uri
    run_id = client.start_run(uri, experiment=training.experiment, name=name, params=params, tags=tags)
    run = Run(
        name=name,
        storage=training.storage,
        data=training.data,
        manifest_sha256=digest,
        mlflow_run=run_id,
        code=code,
        config=config,
        schedules=PUBLISHED[config.time_steps],
        **init,
    )
    try:
        if initial:
            store_first_checkpoint(run, initial.model)
        write_run(run)
    except BaseException:
        client.finish_run(uri, run_id, "FAILED")
        raise
    return run


def store_first_checkpoint(run: Run, model: Any) -> None:
    """Store `model` as the checkpoint of step 0, so that workers on any node, started at any time, begin with it."""
    with tempfile.TemporaryDirectory() as folder:
        save_run_checkpoint(Path(folder), idle_state(model, run.config), run)
        upload(Path(folder), store.join(run.url, checkpoint_name(0)))
