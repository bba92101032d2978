"""One of two data-parallel workers on gloo; run by test_training.py as `python two_workers.py RANK STORE`.

The first worker prints how far the weights of two workers are from those of one worker with the whole batch, relative
to how far training moves them, by case. Each prints how many steps it skipped when the second alone met a loss that was
not finite.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bcm.networks import NCSNppConfig, build_network
from bcm.precond import BCM
from bcm.schedule import ScheduleConfig
from bcm.training import TrainConfig, TrainState, fit

WORKERS = 2
NETWORK = NCSNppConfig(
    image_channels=1, resolution=8, width=8, channel_mult=(1, 1), blocks=1, attention=(), dropout=0.0
)
SCHEDULE = ScheduleConfig(s0=4, s1=16)
CONFIG = TrainConfig(iterations=20, batch_size=8, learning_rate=1e-3, ema_rates=(0.9,))
SHORT = replace(CONFIG, iterations=4)
DROPOUT = replace(NETWORK, dropout=0.3)


@dataclass(frozen=True)
class Batch:
    positions: Tensor
    images: Tensor
    labels: Tensor


def batches(config: TrainConfig, rank: int, workers: int) -> Iterator[Batch]:
    share = config.batch_size // workers
    for k in range(config.iterations):
        first = k * config.batch_size + rank * share
        positions = torch.arange(first, first + share)
        images = (positions[:, None, None, None] * 37 + torch.arange(64).reshape(8, 8) * 3) % 256
        yield Batch(positions, images.to(torch.uint8), positions % 10)


def start(config: TrainConfig, network: NCSNppConfig, dtype: torch.dtype, workers: int) -> TrainState:
    torch.manual_seed(0)
    state = TrainState(BCM(build_network(network)).to(dtype), config)
    if workers > 1:
        state.loss = DistributedDataParallel(state.loss, forward_sync_buffers=False, gradient_as_bucket_view=True)
    return state


def trained(config: TrainConfig, network: NCSNppConfig, dtype: torch.dtype, rank: int, workers: int) -> Tensor:
    """How far training moves each weight."""
    state = start(config, network, dtype, workers)
    before = weights(state)
    for _ in fit(state, batches(config, rank, workers), config, SCHEDULE, rank):
        pass
    return weights(state) - before


def weights(state: TrainState) -> Tensor:
    return nn.utils.parameters_to_vector(state.model.parameters()).detach().double()


def skipped(rank: int) -> int:
    state = start(SHORT, NETWORK, torch.float32, WORKERS)

    def spoil(*call: Any) -> Tensor:
        return call[2] * (torch.inf if rank == 1 and state.k == 1 else 1)

    state.model.F_theta.register_forward_hook(spoil)
    for _ in fit(state, batches(SHORT, rank, WORKERS), SHORT, SCHEDULE, rank):
        pass
    return state.skipped


def main() -> None:
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=WORKERS)
    f32, f64 = torch.float32, torch.float64
    checkpointed, twice = replace(SHORT, checkpoint_activations=True), replace(SHORT, accumulate=2)
    cases = {
        "float64": (trained(CONFIG, NETWORK, f64, rank, WORKERS), lambda: trained(CONFIG, NETWORK, f64, 0, 1)),
        "float32": (trained(CONFIG, NETWORK, f32, rank, WORKERS), lambda: trained(CONFIG, NETWORK, f32, 0, 1)),
        # Two micro-batches of one worker draw the masks of two workers.
        "dropout": (trained(checkpointed, DROPOUT, f64, rank, WORKERS), lambda: trained(twice, DROPOUT, f64, 0, 1)),
        "accumulated": (trained(twice, NETWORK, f64, rank, WORKERS), lambda: trained(SHORT, NETWORK, f64, 0, 1)),
    }
    found = {"skipped": float(skipped(rank))}
    if rank == 0:
        for name, (together, alone) in cases.items():
            expected = alone()
            found[name] = float((together - expected).norm() / expected.norm())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
