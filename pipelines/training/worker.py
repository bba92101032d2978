"""What each worker of a training does."""

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bcm import strict
from bcm.checkpoint import attachment, load_checkpoint
from bcm.networks import build_network
from bcm.precond import BCM
from bcm.training import StepMetrics, TrainState, fit
from data import store
from data.cache import ShardCache
from data.loader import Loader
from data.manifest import Manifest
from data.order import shuffle_of
from pipelines.config import Config
from pipelines.errors import ConfigError
from pipelines.models.checkpoints import checkpoint_name
from pipelines.models.run import NOTES, Notes, Run, save_run_checkpoint
from pipelines.tracking.metriclog import MetricLog, Point
from pipelines.training.progress import Meter, progress_line

if TYPE_CHECKING:
    from ray.train import Checkpoint
    from ray.util.queue import Queue

FLUSH_SECONDS = 20.0
"""How long a checkpoint waits for MLflow, at most; what was not sent by then travels in the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker is given."""

    run: Run
    manifest: Manifest
    tracking_uri: str = field(repr=False)
    """May hold a password; Ray keeps the printed form of a job."""
    lines: "Queue"
    """Where the first worker puts what is shown of its progress."""
    fallback: "Checkpoint | None"
    """The checkpoint to start from when Ray has none: that of step 0, which holds the initial model, or a later one,
    for Ray's record of an interrupted run can be lost. One object for all, as each node downloads an object once."""


def train_worker(entry: dict[str, Job]) -> int:
    """One worker: shards -> batches -> fit -> checkpoint -> report; how many points MLflow has not got in the end."""
    import ray.train

    job, context = entry["job"], ray.train.get_context()
    config, rank, world_size = job.run.config, context.get_world_rank(), context.get_world_size()
    loader = Loader(
        cache=ShardCache(job.run.data, job.manifest, "train"),
        shuffle=shuffle_of(job.manifest, "train", config.window),
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        rank=rank,
        world_size=world_size,
        flip=job.manifest.flip,
    )
    state, unsent = _initial_state(config, job.fallback)
    log = MetricLog(job.tracking_uri, job.run.mlflow_run, unsent) if rank == 0 else None
    meter = Meter(config.train.batch_size)
    batches = meter.watched(loader.batches(state.k * config.train.batch_size))
    for metrics in fit(state, batches, config.train, config.schedule, rank):
        last = state.k == config.train.iterations
        if state.k % config.log_every == 0 or last:
            mean = _over_workers(metrics, world_size)
            if log:
                _tell(job, state, mean, meter, log)
        if state.k % config.checkpoint_every == 0 or last:
            _checkpoint(job.run, state, log)
    if log is None:
        return 0
    left = log.flush(FLUSH_SECONDS)
    log.close()
    return len(left)


def _initial_state(config: Config, fallback: "Checkpoint | None") -> tuple[TrainState, Sequence[Point]]:
    """The state to train on from: that of the last checkpoint, or a fresh one; and metrics not yet in MLflow."""
    import ray.train
    from ray.train.torch import get_device, prepare_model

    torch.manual_seed(config.train.seed)
    model = BCM(build_network(config.network)).to(get_device())
    state = TrainState(model, config.train, conditional=config.network.classes > 0)
    unsent: Sequence[Point] = ()
    if checkpoint := ray.train.get_checkpoint() or fallback:
        with checkpoint.as_directory() as directory:
            load_checkpoint(Path(directory), state, config.network)
            notes = strict.read(Notes, attachment(Path(directory), NOTES), f"{directory}/{NOTES}", ConfigError)
            unsent = notes.unsent
    options = {"forward_sync_buffers": False, "gradient_as_bucket_view": True}
    state.loss = prepare_model(state.loss, move_to_device=False, parallel_strategy_kwargs=options)
    return state, unsent


def _over_workers(metrics: StepMetrics, world_size: int) -> StepMetrics:
    """The losses of the global batch: each worker has seen its share alone."""
    if world_size == 1:
        return metrics
    losses = torch.stack(list(metrics.losses.values()))
    torch.distributed.all_reduce(losses)
    return replace(metrics, losses=dict(zip(metrics.losses, losses / world_size, strict=True)))


def _tell(job: Job, state: TrainState, metrics: StepMetrics, meter: Meter, log: MetricLog) -> None:
    """The first worker's voice: one iteration, its losses averaged over the workers, to MLflow and to the driver."""
    from ray.exceptions import RayError

    config = job.run.config.train
    speed, wait_share = meter.measure()
    losses = {name: float(loss) for name, loss in metrics.losses.items()}
    values = {f"loss_{name}": loss for name, loss in losses.items()}
    values |= {"N": metrics.N, "grad_norm": float(metrics.grad_norm)}
    values |= {"images_seen": state.k * config.batch_size, "skipped_steps": state.skipped}
    values |= {"images_per_second": speed, "data_wait_share": wait_share}
    values |= {"storage_retries": sum(store.retries().values())}
    log.log(state.k, values)
    with suppress(RayError):  # a line that nobody sees is no reason to stop
        job.lines.put_nowait(progress_line(state.k, config, metrics.N, losses, speed, wait_share))


def _checkpoint(run: Run, state: TrainState, log: MetricLog | None) -> None:
    """Save on the first worker and report on all, which Ray Train makes one step for all."""
    import ray.train

    metrics = {"k": state.k}
    if log is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_run_checkpoint(Path(folder), state, run, log.flush(FLUSH_SECONDS))
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=checkpoint_name(state.k))
