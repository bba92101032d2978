"""The global batch does not depend on how many workers share it."""

from contextlib import nullcontext

import pytest
import torch
from made import cached_split

from bcm import rng
from bcm.checkpoint import CheckpointInfo
from bcm.networks import NCSNppConfig
from bcm.schedule import ScheduleConfig, draw_times
from bcm.training import TrainConfig
from bcm.types import BCMError, from_uint8
from data.errors import DataError
from data.loader import Loader
from data.prepare import prepare
from pipelines.errors import ConfigError
from pipelines.training import worker
from pipelines.training.progress import Seen

BATCH = 32
SEED = 3


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("digits")
    manifest = prepare("digits", None, str(root / "shards"))
    return cached_split(str(root / "shards"), manifest, "train", root / "cache")


def global_batch(cached, k: int, world_size: int) -> list[torch.Tensor]:
    """Ids, pixels, noise and times of batch `k`, put together from the shares of all workers."""
    shares = []
    for rank in range(world_size):
        loader = Loader(cached=cached, batch_size=BATCH, seed=SEED, rank=rank, world_size=world_size, flip=False)
        batches = loader.batches(k * BATCH)
        batch = next(batches)
        batches.close()
        z = rng.normal(SEED, rng.Stream.NOISE, k, batch.positions, tuple(batch.images.shape[1:]))
        times = draw_times(rng.uniform(SEED, rng.Stream.TIMES, k, batch.positions, 2), 41, ScheduleConfig())
        shares.append((batch.ids, from_uint8(batch.images), z, times.t_n, times.t_prime))
    return [torch.cat(parts) for parts in zip(*shares, strict=True)]


@pytest.mark.parametrize("k", [0, 7, 46, 1000])  # batch 46 holds the end of the first epoch
def test_global_batch_is_the_same_for_1_2_and_4_workers(cached, k: int):
    alone = global_batch(cached, k, 1)
    for world_size in (2, 4):
        for a, b in zip(alone, global_batch(cached, k, world_size), strict=True):
            assert torch.equal(a, b)
    other = global_batch(cached, k + 1, 1)
    assert not torch.equal(alone[2], other[2])


def test_train_step_uses_exactly_these_draws(cached, monkeypatch: pytest.MonkeyPatch):
    from bcm import training

    seen = {}

    class Loss(torch.nn.Module):
        def forward(self, x, z, times, label):
            seen.update(x=x, z=z, t_n=times.t_n)
            return {"ct": weight.sum() * 0}

    weight = torch.nn.Parameter(torch.ones(1))
    model = torch.nn.Module()
    model.F_theta = torch.nn.Identity()
    model.weight = weight
    config = TrainConfig(iterations=100, batch_size=BATCH, seed=SEED)
    state = training.TrainState(model, config)  # type: ignore[arg-type]
    state.loss, state.k = Loss(), 60
    loader = Loader(cached=cached, batch_size=BATCH, seed=SEED, rank=1, world_size=2, flip=False)
    schedule = ScheduleConfig(s0=40, s1=40)
    training.train_step(state, next(loader.batches(60 * BATCH)), config, schedule, rank=1)
    _, x, z, t_n, _ = global_batch(cached, 60, 1)
    assert torch.equal(seen["x"], x[16:]) and torch.equal(seen["z"], z[16:]) and torch.equal(seen["t_n"], t_n[16:])


def test_an_error_no_restart_can_mend_is_posted_on_the_board():
    posted = []

    class Board:
        def read(self):
            return Seen(failure=posted[0] if posted else None)

        def fail(self, message):
            posted.append(message)

    with pytest.raises(BCMError), worker._final_errors(Board()) as failed:  # type: ignore[arg-type]
        assert not failed
        raise BCMError("diverged")
    with worker._final_errors(Board()) as failed:  # type: ignore[arg-type]
        assert failed
    with pytest.raises(DataError), worker._final_errors(Board()):  # type: ignore[arg-type]
        raise DataError("the store does not answer")
    assert posted == ["diverged"]


@pytest.mark.parametrize(("noted", "refused"), [({}, False), ({"window": 2}, False), ({"window": 3}, True)])
def test_another_order_of_images_is_not_gone_on_with(noted: dict[str, int], refused: bool):
    info = CheckpointInfo(k=1, network=NCSNppConfig(), sigma_data=0.5, skipped=(0, 0), extra=noted, ema_rates=(0.9,))
    expected = pytest.raises(ConfigError, match=r"windows of 3 shards.*windows of 2.*BCM_CACHE_BUDGET")
    with expected if refused else nullcontext():
        worker.check_window(info, 2)
