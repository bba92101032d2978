"""Compares the laws of n' (`bcm.schedule.PAIR_LAWS`) on the digits: equal network, images seen and seeds; one process.

python -m benchmarks.pair_laws --seeds 0 1 --steps 4000

Prints, for each law and seed, the one-step pixel Frechet distance over that of the held-out images, and the
reconstruction error in [0, 1] at 1, 2 and 4 inversion calls with the paper's time steps. About 7 minutes a run.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bcm.inference import Toolkit, generate, reconstruct
from bcm.metrics import Moments, frechet_distance, mse
from bcm.networks import build_network
from bcm.precond import BCM
from bcm.schedule import PAIR_LAWS
from bcm.timesteps import PAPER_CIFAR10
from bcm.training import TrainState, fit
from bcm.types import Images, from_uint8
from data.order import batch_ids
from data.sources import digits
from pipelines.config import Config
from pipelines.recipes import recipe
from pipelines.scoring import pixels

SAMPLES = 2000


@dataclass(frozen=True)
class Batch:
    positions: Tensor
    images: Tensor
    labels: Tensor


def images(split: str) -> Tensor:
    return torch.from_numpy(np.stack([sample.image for sample in digits.samples(split)]))[:, None]


def batches(train: Tensor, config: Config) -> Iterator[Batch]:
    seen, size = 0, config.train.batch_size
    while True:
        _, ids = batch_ids(config.train.seed, seen, size, len(train))
        yield Batch(torch.arange(seen, seen + size), train[ids], torch.zeros(size, dtype=torch.int64))
        seen += size


def trained(config: Config, train: Tensor) -> Toolkit:
    torch.manual_seed(config.train.seed)
    state = TrainState(BCM(build_network(config.network)), config.train)
    for _ in fit(state, batches(train, config), config.train, config.schedule):
        pass
    model = state.ema.model
    assert isinstance(model, BCM)
    return Toolkit(model=model, network=config.network, k=state.k, schedules=PAPER_CIFAR10)


def scores(toolkit: Toolkit, train: Images, test: Images) -> list[float]:
    reference = Moments.of(pixels(train))
    unit = frechet_distance(Moments.of(pixels(test)), reference)
    samples = Moments.of(pixels(generate(toolkit, range(SAMPLES), 1)))
    errors = [float(mse(reconstruct(toolkit, test, range(len(test)), nfe), test).mean()) for nfe in (1, 2, 4)]
    return [frechet_distance(samples, reference) / unit, *errors]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pair_laws")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=recipe("digits").train.iterations)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, test = images("train"), images("test")
    print(f"{'law':6}  seed  Frechet/test  MSE 1 NFE  MSE 2 NFE  MSE 4 NFE")
    for seed in options.seeds:
        for law in PAIR_LAWS:
            config = recipe("digits")
            config = replace(
                config,
                schedule=replace(config.schedule, pairs=law),
                train=replace(config.train, seed=seed, iterations=options.steps),
            )
            found = scores(trained(config, train), from_uint8(train), from_uint8(test))
            print(f"{law:6}  {seed:4}  {found[0]:12.3f}  {found[1]:9.5f}  {found[2]:9.5f}  {found[3]:9.5f}", flush=True)


if __name__ == "__main__":
    main()
