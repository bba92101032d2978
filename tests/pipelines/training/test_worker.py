"""One worker of a training, run in this process by Ray Train's local mode, against a slow reference."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import cached_split
from mlflow import MlflowClient
from world import NAME, World

from bcm import rng, strict
from bcm.checkpoint import attachment, local_index
from bcm.networks import build_network
from bcm.precond import BCM
from bcm.schedule import ScheduleConfig, draw_times
from bcm.training import StepMetrics, TrainConfig, TrainState, train_step
from bcm.types import from_uint8
from data import store
from data.cache import ShardCache
from data.loader import Batch, Loader
from data.manifest import load_manifest
from data.order import batch_ids, flips, shuffle_of
from data.prepare import Choices, prepare
from pipelines.config import Config
from pipelines.models.run import NOTES, Notes, Run, read_run, save_run_checkpoint
from pipelines.recipes import recipe
from pipelines.tracking import client
from pipelines.tracking.metriclog import Point
from pipelines.training import worker
from pipelines.training.worker import Job, train_worker

BATCH, K = 16, 8


@dataclass
class Place:
    """A data set of seven shards that may be mirrored, a config with windows of two, and what a worker left."""

    root: Path
    config: Config
    run: Run
    kept: list[Path] = field(default_factory=list)
    """Its checkpoints, the oldest first."""
    lines: list[str] = field(default_factory=list)

    def put_nowait(self, line: str) -> None:
        """What it says of its progress, as to Ray's queue."""
        self.lines.append(line)


@pytest.fixture
def place(world: World, monkeypatch: pytest.MonkeyPatch) -> Place:
    import ray.train

    data = str(world.root / "seven")
    manifest = prepare("digits", None, data, choices=Choices(samples_per_shard=220))
    smoke = recipe("digits", smoke=True)
    config = replace(
        smoke,
        train=replace(smoke.train, iterations=K, batch_size=BATCH),
        scaling=replace(smoke.scaling, workers=1),
        window=2,
        checkpoint_every=3,
        log_every=2,
    )
    run = replace(read_run(str(world.run)), data=data, config=config, manifest_sha256=manifest.sha256)
    made = Place(world.root, config, run)

    def report(metrics: dict[str, Any], checkpoint: Any = None, checkpoint_dir_name: str = "") -> None:
        kept = world.root / "kept" / checkpoint_dir_name
        shutil.copytree(checkpoint.path, kept)
        made.kept.append(kept)

    monkeypatch.setattr(ray.train, "report", report)
    return made


def train(place: Place, fallback: Path | None = None, config: Config | None = None) -> int:
    """What `launch` does with one worker, in this process; how many points MLflow has not got."""
    import ray.train
    from ray.train.torch import TorchTrainer

    manifest = replace(load_manifest(place.run.data), flip=True)
    job = Job(
        run=replace(place.run, config=config or place.config),
        manifest=manifest,
        tracking_uri=client.resolve_uri("runs"),
        lines=place,  # type: ignore[arg-type]
        fallback=ray.train.Checkpoint.from_directory(fallback) if fallback else None,
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(num_workers=0),
        run_config=ray.train.RunConfig(name="here", storage_path=str(place.root / "ray")),
    )
    return int(trainer.fit().return_value or 0)


def reference(place: Place) -> tuple[TrainState, list[StepMetrics]]:
    """The same training, with batches put together image by image."""
    config, manifest = place.config, load_manifest(place.run.data)
    whole = cached_split(place.run.data, manifest, "train", place.root / "reference")
    shuffle = shuffle_of(manifest, "train", 2)
    torch.manual_seed(config.train.seed)
    state = TrainState(BCM(build_network(config.network)), config.train)
    steps: list[StepMetrics] = []
    for k in range(K):
        epochs, ids = batch_ids(config.train.seed, k * BATCH, BATCH, shuffle)
        images = whole.images[ids]
        for row, (epoch, image_id) in enumerate(zip(epochs.tolist(), ids.tolist(), strict=True)):
            if flips(config.train.seed, epoch, len(whole.labels))[image_id]:
                images[row] = images[row, :, :, ::-1]
        batch = Batch(
            ids=torch.from_numpy(ids),
            images=torch.from_numpy(images),
            labels=torch.from_numpy(whole.labels[ids]),
            positions=torch.arange(k * BATCH, (k + 1) * BATCH),
            wait=0.0,
        )
        steps.append(train_step(state, batch, config.train, config.schedule))
    return state, steps


def history(place: Place, name: str) -> dict[int, float]:
    metrics = MlflowClient(client.resolve_uri("runs")).get_metric_history(place.run.mlflow_run, name)
    return {metric.step: metric.value for metric in metrics}


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_worker_trains_logs_and_saves_as_the_reference_does(place: Place):
    train(place)
    state, steps = reference(place)
    assert [path.name for path in place.kept] == [f"checkpoint_{k:09d}" for k in (3, 6, 8)]
    assert [local_index(path).k for path in place.kept] == [3, 6, 8]
    config = place.config
    resumed = TrainState(BCM(build_network(config.network)), config.train)
    worker.load_checkpoint(place.kept[-1], resumed, config.network)
    for ours, theirs in zip(resumed.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    logged = history(place, "loss_ct")
    assert logged == {k: pytest.approx(float(steps[k - 1].losses["ct"]), rel=1e-6) for k in (2, 4, 6, 8)}
    assert history(place, "images_seen") == {k: k * BATCH for k in (2, 4, 6, 8)}
    assert history(place, "N") == {k: steps[k - 1].N for k in (2, 4, 6, 8)}
    assert set(history(place, "storage_retries").values()) == {sum(store.retries().values())}
    assert [line.split("  ")[0] for line in place.lines] == [f"step {k}/{K}" for k in (2, 4, 6, 8)]
    assert [line.split("  ")[2] for line in place.lines] == [f"ct {logged[k]:.3f}" for k in (2, 4, 6, 8)]


def test_a_checkpoint_says_which_run_it_is_of_and_how_far(place: Place):
    assert train(place) == 0
    notes = [strict.read(Notes, attachment(path, NOTES), NOTES, complete=True) for path in place.kept]
    assert [note.images_seen for note in notes] == [3 * BATCH, 6 * BATCH, 8 * BATCH]
    assert all(note.run == place.run for note in notes)
    assert place.run.name == NAME


def test_a_worker_goes_on_from_a_checkpoint_bit_for_bit(place: Place):
    train(place)
    unbroken = weights(place.kept[-1])
    first = place.root / "first"
    place.kept[0].rename(first)
    shutil.rmtree(place.root / "kept")
    place.kept.clear()
    train(place, fallback=first)
    assert [local_index(path).k for path in place.kept] == [6, 8]
    assert weights(place.kept[-1]) == unbroken


def test_metrics_that_a_checkpoint_holds_unsent_are_sent_by_the_next_attempt(place: Place):
    train(place)
    start = place.kept[0]
    config = place.config
    state = TrainState(BCM(build_network(config.network)), config.train)
    worker.load_checkpoint(start, state, config.network)
    unsent = (Point(9, 5, {"loss_ct": 0.5}), Point(10, 6, {"loss_ct": 0.25}))
    save_run_checkpoint(place.root / "start", state, place.run, unsent)
    shutil.rmtree(place.root / "kept")
    train(place, fallback=place.root / "start")
    assert history(place, "loss_ct")[9] == 0.5 and history(place, "loss_ct")[10] == 0.25


def test_what_is_logged_is_the_mean_over_all_workers(place: Place, monkeypatch: pytest.MonkeyPatch):
    over_workers = worker._over_workers

    def of_four(metrics: StepMetrics, world_size: int) -> StepMetrics:
        assert world_size == 1
        return over_workers(metrics, 4)

    def all_reduce(losses: torch.Tensor) -> None:
        losses *= 10  # as if the others' losses were nine times this one's in all

    train(place)
    alone = history(place, "loss_ct")
    shutil.rmtree(place.root / "kept")
    run = client.start_run(client.resolve_uri("runs"), experiment="bcm", name="four", params={}, tags={})
    place.run = replace(place.run, mlflow_run=run)
    monkeypatch.setattr(worker, "_over_workers", of_four)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    train(place)
    assert history(place, "loss_ct") == {k: pytest.approx(loss * 10 / 4, rel=1e-6) for k, loss in alone.items()}


def test_points_that_mlflow_did_not_get_are_counted_at_the_end(place: Place, no_server: str, monkeypatch: Any):
    monkeypatch.setattr(worker, "FLUSH_SECONDS", 0.3)
    assert train(place) == 4
    notes = strict.read(Notes, attachment(place.kept[-1], NOTES), NOTES, complete=True)
    assert [point.step for point in notes.unsent] == [2, 4, 6, 8]


# ---- the global batch does not depend on how many workers share it

Shares = Callable[..., Loader]
SEED = 3


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Shares:
    root = tmp_path_factory.mktemp("digits")
    manifest = prepare("digits", None, str(root / "shards"))

    def make(rank: int, world_size: int) -> Loader:
        return Loader(
            cache=ShardCache(str(root / "shards"), manifest, "train", root / "cache"),
            shuffle=shuffle_of(manifest, "train"),
            batch_size=48,
            seed=SEED,
            rank=rank,
            world_size=world_size,
            flip=False,
        )

    return make


def global_batch(shares: Shares, k: int, world_size: int) -> list[torch.Tensor]:
    """Ids, pixels, noise and times of batch `k`, put together from the shares of all workers."""
    parts = []
    for rank in range(world_size):
        batch = shares(rank, world_size).batch(k * 48)
        z = rng.normal(SEED, rng.Stream.NOISE, k, batch.positions, tuple(batch.images.shape[1:]))
        times = draw_times(rng.uniform(SEED, rng.Stream.TIMES, k, batch.positions, 2), 41, ScheduleConfig())
        parts.append((batch.ids, from_uint8(batch.images), z, times.t_n, times.t_prime))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize("k", [0, 7, 31, 1000])  # batch 31 holds the end of the first epoch
def test_the_global_batch_is_the_same_for_1_2_3_and_4_workers(shares: Shares, k: int):
    alone = global_batch(shares, k, 1)
    for world_size in (2, 3, 4):
        for a, b in zip(alone, global_batch(shares, k, world_size), strict=True):
            assert torch.equal(a, b)
    other = global_batch(shares, k + 1, 1)
    assert not torch.equal(alone[2], other[2])


def test_train_step_uses_exactly_these_draws(shares: Shares):
    seen: dict[str, torch.Tensor] = {}

    class Loss(torch.nn.Module):
        def forward(self, x: torch.Tensor, z: torch.Tensor, times: Any, label: Any) -> dict[str, torch.Tensor]:
            seen.update(x=x, z=z, t_n=times.t_n)
            return {"ct": weight.sum() * 0}

    weight = torch.nn.Parameter(torch.ones(1))
    model: Any = torch.nn.Module()
    model.F_theta = torch.nn.Identity()
    model.weight = weight
    config = TrainConfig(iterations=100, batch_size=48, seed=SEED)
    state = TrainState(model, config)
    state.loss, state.k = Loss(), 60
    train_step(state, shares(1, 2).batch(60 * 48), config, ScheduleConfig(s0=40, s1=40), rank=1)
    _, x, z, t_n, _ = global_batch(shares, 60, 1)
    assert torch.equal(seen["x"], x[24:]) and torch.equal(seen["z"], z[24:]) and torch.equal(seen["t_n"], t_n[24:])
    assert np.isfinite(x.numpy()).all()
