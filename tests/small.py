"""A small training of bcm: its network, its config, its batches, its state."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bcm.networks import NCSNppConfig, build_network
from bcm.precond import BCM
from bcm.schedule import ScheduleConfig
from bcm.training import StepMetrics, TrainConfig, TrainState, fit

NETWORK = NCSNppConfig(
    image_channels=1, resolution=8, width=8, channel_mult=(1, 1), blocks=1, attention=(), dropout=0.1
)
CONFIG = TrainConfig(iterations=12, batch_size=8, learning_rate=1e-3, ema_rates=(0.9,))
SCHEDULE = ScheduleConfig(s0=2, s1=8)
LEFT = torch.cat([torch.full((1, 8, 4), 255), torch.zeros(1, 8, 4)], dim=2).to(torch.uint8)
IMAGES = torch.stack([LEFT if i % 2 else LEFT.flip(2) for i in range(40)])


@dataclass
class Batch:
    positions: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor


def batches(k: int = 0) -> Iterator[Batch]:
    while True:
        positions = torch.arange(k * 8, k * 8 + 8)
        yield Batch(positions, IMAGES[positions % 40], positions % 10)
        k += 1


def start(network: NCSNppConfig = NETWORK, config: TrainConfig = CONFIG) -> TrainState:
    torch.manual_seed(0)
    return TrainState(BCM(build_network(network)), config, conditional=network.classes > 0)


def weights(state: TrainState) -> list[torch.Tensor]:
    entries = [state.optimizer.state[p] for p in state.model.parameters() if p in state.optimizer.state]
    moments = [entry[name] for entry in entries for name in sorted(entry)]
    averages = [p for average in state.averages.values() for p in average.parameters()]
    return [*state.model.parameters(), *averages, *moments]


def trained(config: TrainConfig, network: NCSNppConfig = NETWORK, steps: int = 3) -> tuple[TrainState, StepMetrics]:
    state = start(network, config)
    for step in fit(state, batches(), config, SCHEDULE):
        if step.k == steps - 1:
            return state, step
    raise AssertionError("too few iterations")
