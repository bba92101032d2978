"""What a dry run says is what training then does."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bcm import strict
from bcm.cost import step_cost
from bcm.networks import build_network
from bcm.precond import BCM
from bcm.schedule import ScheduleConfig, discretization
from bcm.training import TrainState, train_step
from data.loader import Batch
from pipelines.config import Config
from pipelines.recipes import RECIPES, recipe
from pipelines.training.describe import amount, describe, stages_of

SMOKE = [name for name in RECIPES if name.endswith("-smoke")]
SWITCHED = replace(recipe("cifar10-bcm", smoke=True).train, precision="bf16", accumulate=2, checkpoint_activations=True)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def two_steps(config: Config) -> None:
    """What one of the workers of a training does first."""
    network, share = config.network, config.train.batch_size // config.scaling.workers
    state = TrainState(BCM(build_network(network)), config.train, conditional=network.classes > 0)
    state.loss = DistributedDataParallel(state.loss, forward_sync_buffers=False, gradient_as_bucket_view=True)
    shape = (share, network.image_channels, network.resolution, network.resolution)
    index = torch.zeros(share, dtype=torch.int64)
    for _ in range(2):
        images = torch.zeros(shape, dtype=torch.uint8)
        batch = Batch(ids=index, images=images, labels=index, positions=index, wait=0.0)
        train_step(state, batch, config.train, config.schedule)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [*map(recipe, SMOKE), replace(recipe("cifar10-bcm", smoke=True), train=SWITCHED)],
    ids=[*SMOKE, "cifar10-bcm-smoke with every switch for memory"],
)
def test_the_memory_of_a_worker_is_what_its_steps_take(
    config: Config, alone: None, peak_memory: Callable[[Callable[[], object]], int]
):
    cost = step_cost(config.network, config.train, config.schedule, config.scaling.workers)
    assert cost.peak == pytest.approx(peak_memory(lambda: two_steps(config)), rel=0.25)


@pytest.mark.parametrize(
    ("K", "schedule"),
    [
        (400, ScheduleConfig()),
        (37, ScheduleConfig(s0=10, s1=100)),
        (3, ScheduleConfig()),
        (60, ScheduleConfig(curriculum_N=(320, 480, 640), curriculum_steps=(50, 7, 3))),
    ],
)
def test_stages_are_those_of_training(K: int, schedule: ScheduleConfig):
    runs = groupby(range(K), key=lambda k: discretization(k, K, schedule))
    assert list(stages_of(K, schedule)) == [(next(ks), N) for N, ks in runs]


def test_everything_is_shown():
    config = recipe("digits-finetune")
    text = describe(config)
    end = text.index("\n}\n") + 2
    assert strict.read(Config, text[:end], "dry run", complete=True) == config
    cost = step_cost(config.network, config.train, config.schedule, config.scaling.workers)
    said = text[end:]
    assert f"{cost.parameters:,}" in said and f"{cost.step_flops:.3g}" in said
    assert f"about {amount(cost.peak)} of tensors" in said and f"weights {amount(cost.weights)}" in said
    assert f"{config.train.iterations * config.train.batch_size:,}" in said
    N, steps = config.schedule.curriculum_N, config.schedule.curriculum_steps
    assert f"N={N[0]} from step 0, N={N[1]} from step {steps[0]:,}" in said


@pytest.mark.parametrize(("size", "said"), [(2**20, "1 MiB"), (2**30 - 2**20, "1.02e+03 MiB"), (3 * 2**29, "1.5 GiB")])
def test_amounts_are_for_people(size: int, said: str):
    assert amount(size) == said
