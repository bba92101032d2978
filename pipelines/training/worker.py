"""What each worker of a training does."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bcm import strict
from bcm.checkpoint import attachment, load_checkpoint, save_checkpoint
from bcm.networks import build_network
from bcm.precond import BCM
from bcm.training import StepMetrics, TrainState, fit
from data import store
from data.cache import ShardCache
from data.loader import Batch, Loader
from data.manifest import Manifest
from data.order import shuffle_of
from pipelines.config import Config
from pipelines.errors import ConfigError
from pipelines.models.checkpoints import checkpoint_name
from pipelines.models.run import NOTES, Notes, Run
from pipelines.tracking.metriclog import MetricLog, Point
from pipelines.training.progress import Board, Meter, Progress

if TYPE_CHECKING:
    from ray.train import Checkpoint

FLUSH_SECONDS = 20.0
"""How long a checkpoint waits for MLflow, at most; what was not sent by then travels in the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker is given."""

    run: Run
    manifest: Manifest
    tracking_uri: str = field(repr=False)
    """May hold a password; Ray keeps the printed form of a job."""
    board: Board
    fallback: "Checkpoint | None"
    """The checkpoint to start from when Ray has none: that of step 0, which holds the initial model, or a later one,
    for Ray's record of an interrupted run can be lost. One object for all, as each node downloads an object once."""


def train_worker(entry: dict[str, Job]) -> None:
    """One worker: shards -> batches -> fit -> checkpoint -> report."""
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
    reporter = Reporter(job, unsent) if rank == 0 else None
    batches = _metered(loader.batches(state.k * config.train.batch_size), reporter)
    for metrics in fit(state, batches, config.train, config.schedule, rank):
        last = state.k == config.train.iterations
        if state.k % config.log_every == 0 or last:
            mean = _over_workers(metrics, world_size)
            if reporter:
                reporter.point(state, mean)
        if state.k % config.checkpoint_every == 0 or last:
            _checkpoint(job, state, reporter)
    if reporter:
        reporter.close()


def _initial_state(config: Config, fallback: "Checkpoint | None") -> tuple[TrainState, Sequence[Point]]:
    """The state to train on from: that of the last checkpoint, or a fresh one; and metrics not yet in MLflow."""
    from ray.train.torch import get_device, prepare_model

    torch.manual_seed(config.train.seed)
    model = BCM(build_network(config.network)).to(get_device())
    state = TrainState(model, config.train, conditional=config.network.classes > 0)
    unsent: Sequence[Point] = ()
    with _last_checkpoint(fallback) as directory:
        if directory:
            load_checkpoint(directory, state, config.network)
            notes = strict.read(Notes, attachment(directory, NOTES), f"{directory}/{NOTES}", ConfigError)
            unsent = notes.unsent
    options = {"forward_sync_buffers": False, "gradient_as_bucket_view": True}
    state.loss = prepare_model(state.loss, move_to_device=False, parallel_strategy_kwargs=options)
    return state, unsent


@contextmanager
def _last_checkpoint(fallback: "Checkpoint | None") -> Iterator[Path | None]:
    """The files of the checkpoint to start from: the newest that Ray knows, else `fallback`, if any."""
    import ray.train

    checkpoint = ray.train.get_checkpoint() or fallback
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as directory:
        yield Path(directory)


class Reporter:
    """The first worker's voice: metrics to MLflow and progress to the driver."""

    def __init__(self, job: Job, unsent: Sequence[Point]) -> None:
        """Start; `unsent` are metrics that an interrupted attempt could not deliver."""
        self.job = job
        self.meter = Meter()
        self.log = MetricLog(job.tracking_uri, job.run.mlflow_run, unsent)

    def point(self, state: TrainState, metrics: StepMetrics) -> None:
        """Report one iteration, its losses averaged over the workers."""
        config = self.job.run.config
        speed, wait_share = self.meter.measure()
        losses = {name: float(loss) for name, loss in metrics.losses.items()}
        values = {f"loss_{name}": loss for name, loss in losses.items()}
        values |= {"N": metrics.N, "grad_norm": float(metrics.grad_norm)}
        values |= {"images_seen": state.k * config.train.batch_size, "skipped_steps": state.skipped}
        values |= {"images_per_second": speed, "data_wait_share": wait_share}
        values |= {"storage_retries": sum(store.retries().values())}
        self.log.log(state.k, values)
        self.job.board.post(Progress(state.k, config.train.iterations, metrics.N, losses, speed, wait_share))

    def unsent(self) -> list[Point]:
        """Send what can be sent now; the rest."""
        return self.log.flush(FLUSH_SECONDS)

    def close(self) -> None:
        """Send what is left and stop."""
        if left := self.log.flush(FLUSH_SECONDS):
            self.job.board.warn(
                f"{len(left)} points of metrics have not reached MLflow; they stand in the last checkpoint. "
                f"Send them when it answers again: --resume {self.job.run.name}"
            )
        self.log.close()


def _over_workers(metrics: StepMetrics, world_size: int) -> StepMetrics:
    """The losses of the global batch: each worker has seen its share alone."""
    if world_size == 1:
        return metrics
    losses = torch.stack(list(metrics.losses.values()))
    torch.distributed.all_reduce(losses)
    return replace(metrics, losses=dict(zip(metrics.losses, losses / world_size, strict=True)))


def _metered(batches: Iterator[Batch], reporter: Reporter | None) -> Iterator[Batch]:
    for batch in batches:
        if reporter:
            reporter.meter.add(reporter.job.run.config.train.batch_size, batch.wait)
        yield batch


def _checkpoint(job: Job, state: TrainState, reporter: Reporter | None) -> None:
    """Save on the first worker and report on all, which Ray Train makes one step for all."""
    import ray.train

    metrics = {"k": state.k}
    if reporter is None:
        ray.train.report(metrics)
        return
    images_seen = state.k * job.run.config.train.batch_size
    notes = Notes(run=job.run, images_seen=images_seen, unsent=tuple(reporter.unsent()))
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), state, job.run.config.network, {NOTES: note_text(notes)})
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=checkpoint_name(state.k))


def note_text(notes: Notes) -> bytes:
    """The notes as they stand in a checkpoint."""
    return json.dumps(strict.dump(notes), indent=1).encode()
