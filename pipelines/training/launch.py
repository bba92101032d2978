"""From a checked training to Ray Train, and what is noted of it before and after."""

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bcm import strict
from bcm.checkpoint import save_checkpoint
from cluster import options, session
from data import store
from data.cache import BUDGET_VARIABLE, CACHE_VARIABLE
from pipelines.config import flatten
from pipelines.errors import ConfigError, TrackingError
from pipelines.models.checkpoints import checkpoint_name, forget_damaged_record, upload
from pipelines.models.run import NOTES, Notes, Run, code_version, new_name, write_run
from pipelines.tracking import client
from pipelines.training.checks import Training, idle_state
from pipelines.training.progress import Board, shown
from pipelines.training.worker import Job, note_text, train_worker

if TYPE_CHECKING:
    from ray.train import Checkpoint


def launch(training: Training) -> Run:
    """Run a checked training to its end; must stand in a `cluster.session.connect`."""
    import ray
    from ray.train.torch import TorchTrainer

    from pipelines.training.callbacks import FinalErrors

    config, uri = training.config, training.tracking_uri
    options.check_resources(config.scaling)
    several = len([node for node in ray.nodes() if node["Alive"]]) > 1
    if client.is_local(uri) and (several or session.in_job()):
        raise ConfigError(
            f"the MLflow store {uri} is a file of this machine, out of reach for a job or for other nodes. "
            "Set MLFLOW_TRACKING_URI to an MLflow server, in the environment of the cluster."
        )
    run = _continued(training) if training.resumed else _begun(training)
    ending: Any = "FAILED"
    try:
        print(f"run {run.url}\nMLflow run {run.mlflow_run} at {client.redacted(uri)}", flush=True)
        board = Board()
        first = store.join(run.url, checkpoint_name(0)) if run.init else None
        fallback = _checkpoint_at(training.fallback or first)
        job = Job(run=run, manifest=training.manifest, tracking_uri=uri, board=board, fallback=fallback)
        filesystem, path = store.arrow_filesystem(run.storage)
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job},
            scaling_config=options.scaling_config(config.scaling),
            run_config=options.run_config(
                config.scaling,
                name=run.name,
                storage_path=path,
                storage_filesystem=filesystem,
                worker_env={name: os.environ[name] for name in (CACHE_VARIABLE, BUDGET_VARIABLE) if name in os.environ},
                callbacks=[FinalErrors()],
            ),
        )
        with shown(board, config.train.batch_size):
            options.fit(trainer)
        if warning := board.read().warning:
            print(f"warning: {warning}", file=sys.stderr)
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


def _continued(training: Training) -> Run:
    assert training.resumed
    forget_damaged_record(training.resumed.url)
    client.continue_run(training.tracking_uri, training.resumed.mlflow_run)
    return training.resumed


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
    state = idle_state(model, run.config)
    with tempfile.TemporaryDirectory() as folder:
        notes = note_text(Notes(run=run, images_seen=0))
        save_checkpoint(Path(folder), state, run.config.network, {NOTES: notes})
        upload(Path(folder), store.join(run.url, checkpoint_name(0)))


def _checkpoint_at(url: str | None) -> "Checkpoint | None":
    from ray.train import Checkpoint

    if url is None:
        return None
    filesystem, path = store.arrow_filesystem(url)
    return Checkpoint(path, filesystem)
