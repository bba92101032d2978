"""The cost of a step is counted without doing it; here the step is done, and its operations and memory are counted."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bcm.cost import step_cost
from bcm.networks import ADMConfig, NCSNppConfig, NetworkConfig, build_network
from bcm.precond import BCM
from bcm.schedule import ScheduleConfig
from bcm.training import TrainConfig, TrainState, train_step

NCSNPP = NCSNppConfig(resolution=16, width=32, channel_mult=(1, 2), blocks=1, attention=(8,))
ADM = ADMConfig(resolution=16, width=64, channel_mult=(1, 2), blocks=1, attention=(8,), classes=10)
TINY = ADMConfig(resolution=8, width=32, channel_mult=(1,), blocks=1, attention=(), head_channels=32, classes=10)
TRAIN = TrainConfig(batch_size=4)
SCHEDULE = ScheduleConfig()


@dataclass
class Batch:
    positions: Tensor
    images: Tensor
    labels: Tensor


def batch(network: NetworkConfig, size: int) -> Batch:
    shape = (size, network.image_channels, network.resolution, network.resolution)
    return Batch(torch.arange(size), torch.zeros(shape, dtype=torch.uint8), torch.zeros(size, dtype=torch.int64))


def new_state(network: NetworkConfig, train: TrainConfig) -> TrainState:
    return TrainState(BCM(build_network(network)), train, conditional=network.classes > 0)


def counted(network: NetworkConfig, train: TrainConfig) -> tuple[int, int]:
    """FLOPs of one real forward pass of the batch, and of one real step."""
    state, images = new_state(network, train), batch(network, train.batch_size)
    ones = torch.ones(train.batch_size, dtype=torch.float64)
    with FlopCounterMode(display=False) as forward:
        state.model(images.images.float(), ones, ones, images.labels if state.conditional else None)
    with FlopCounterMode(display=False) as step:
        train_step(state, images, train, SCHEDULE)
    return forward.get_total_flops(), step.get_total_flops()


@pytest.mark.parametrize("network", [NCSNPP, ADM], ids=["ncsnpp", "adm"])
@pytest.mark.parametrize(
    ("objective", "floor"), [("bct", 9), ("bct-official", 9), ("bct-eq8", 10), ("ct", 4), ("st-only", 6), ("edm", 3)]
)
def test_a_step_does_no_more_than_its_passes_need(network: NetworkConfig, objective: str, floor: int):
    """In forward passes: a student's is 1, its backward 2; a target's is 1; an outer pass is 1, its backward 1."""
    times = 1 if objective in ("ct", "edm") else 2
    forward, step = counted(replace(network, times=times), replace(TRAIN, objective=objective))
    assert floor - 0.2 < step / forward <= floor + 0.05


@pytest.mark.parametrize("network", [NCSNPP, ADM], ids=["ncsnpp", "adm"])
def test_the_cost_is_that_of_a_real_step(network: NetworkConfig):
    forward, step = counted(network, TRAIN)
    cost = step_cost(network, TRAIN, SCHEDULE)
    # The library's counter knows no attention on the CPU.
    assert forward <= cost.forward_flops < 1.03 * forward
    assert step <= cost.step_flops < 1.03 * step


def test_flops_are_those_of_all_workers_and_micro_batches_and_the_same_each_time():
    whole = step_cost(TINY, TRAIN, SCHEDULE)
    shared = step_cost(TINY, replace(TRAIN, batch_size=16, accumulate=2), SCHEDULE, workers=2)
    assert (shared.forward_flops, shared.step_flops) == (4 * whole.forward_flops, 4 * whole.step_flops)
    assert step_cost.__wrapped__(TINY, TRAIN, SCHEDULE) == whole


SWITCHES: dict[str, dict[str, object]] = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    "micro-batches": {"accumulate": 4},
    "checkpoints": {"checkpoint_activations": True},
    "averages": {"ema_rates": (0.9, 0.99, 0.999)},
}


def switched(name: str) -> TrainConfig:
    return TrainConfig(batch_size=32, **SWITCHES[name])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", SWITCHES)
def test_memory_is_what_a_step_takes(name: str, peak_memory: Callable[[Callable[[], object]], int]):
    train = switched(name)

    def work() -> None:
        state = new_state(TINY, train)
        for _ in range(2):  # the first makes the optimizer's moments
            train_step(state, batch(TINY, train.batch_size), train, SCHEDULE)

    assert step_cost(TINY, train, SCHEDULE).peak == pytest.approx(peak_memory(work), rel=0.1)


def test_memory_by_part():
    cost = step_cost(TINY, switched("averages"), SCHEDULE)
    assert cost.gradients == 4 * cost.parameters <= cost.weights
    assert cost.moments == pytest.approx(2 * cost.gradients, rel=0.01)
    assert cost.averages == 3 * cost.weights
    assert cost.peak > cost.weights + cost.moments + cost.averages


@pytest.mark.parametrize(("name", "most"), [("bf16", 0.8), ("micro-batches", 0.5), ("checkpoints", 0.8)])
def test_switches_save_memory(name: str, most: float):
    assert step_cost(TINY, switched(name), SCHEDULE).peak < most * step_cost(TINY, switched("plain"), SCHEDULE).peak
