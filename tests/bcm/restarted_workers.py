"""One of several data-parallel workers on gloo; test_restart.py runs `python restarted_workers.py RANK WORLD STORE`.

The first worker prints, by case, how many weights of a training that was stopped and started again differ from those of
one that never stopped.
"""

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from two_workers import NETWORK, SCHEDULE, Batch

from bcm.networks import build_network
from bcm.precond import BCM
from bcm.training import TrainConfig, TrainState, fit

CONFIG = TrainConfig(iterations=6, batch_size=24, learning_rate=1e-3, ema_rates=(0.9,))
STOP = 3


def batches(first: int, rank: int, workers: int) -> Iterator[Batch]:
    share = CONFIG.batch_size // workers
    for k in range(first, CONFIG.iterations):
        positions = torch.arange(share) + k * CONFIG.batch_size + rank * share
        images = torch.randint(256, (share, 1, 8, 8), generator=torch.Generator().manual_seed(k * workers + rank))
        yield Batch(positions, images.to(torch.uint8), positions % 10)


def start(config: TrainConfig, earlier: TrainState | None = None) -> TrainState:
    torch.manual_seed(0)
    state = TrainState(BCM(build_network(NETWORK)), config)
    if earlier:
        state.model.load_state_dict(earlier.model.state_dict())
        state.optimizer.load_state_dict(copy.deepcopy(earlier.optimizer.state_dict()))
        state.k = earlier.k
    state.loss = DistributedDataParallel(state.loss, forward_sync_buffers=False, gradient_as_bucket_view=True)
    return state


def train(state: TrainState, config: TrainConfig, until: int, rank: int, workers: int) -> TrainState:
    for _ in fit(state, batches(state.k, rank, workers), config, SCHEDULE, rank):
        if state.k == until:
            break
    return state


def weights(state: TrainState) -> list[Tensor]:
    return [p.detach() for p in state.model.parameters()]


def differing(config: TrainConfig, rank: int, workers: int) -> int:
    unbroken = train(start(config), config, config.iterations, rank, workers)
    stopped = train(start(config), config, STOP, rank, workers)
    again = train(start(config, stopped), config, config.iterations, rank, workers)
    return sum(not torch.equal(p, q) for p, q in zip(weights(unbroken), weights(again), strict=True))


def main() -> None:
    rank, workers = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=workers)
    cases = {
        "plain": CONFIG,
        "accumulated": replace(CONFIG, accumulate=2),
        "activations": replace(CONFIG, checkpoint_activations=True),
    }
    print(json.dumps({name: differing(config, rank, workers) for name, config in cases.items()}))


if __name__ == "__main__":
    main()
