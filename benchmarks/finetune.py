"""Compares BCM fine-tuned from iCT with BCM from scratch on the digits: equal images seen and seeds; one process.

python -m benchmarks.finetune --seeds 0 1 2 --steps 2500

Half of the steps train the consistency model, half fine-tune it; beside it stands BCM from scratch with all steps, and
with half, which is what fine-tuning costs those who have a consistency model already. Cost is in forward passes an
image: 4 for iCT, 9 for BCM. The paper's time steps; two minutes a seed with the default steps on one core.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from bcm.finetune import bidirectional
from bcm.inference import Toolkit, generate, reconstruct
from bcm.metrics import Moments, frechet_distance, mse
from bcm.networks import build_network
from bcm.precond import BCM
from bcm.timesteps import PUBLISHED
from bcm.training import TrainState, fit
from benchmarks.batches import batches
from benchmarks.on_digits import uint8_images
from benchmarks.pair_laws import SAMPLES, Real, real_images
from pipelines.config import Config
from pipelines.evaluation.features import pixels
from pipelines.recipes import recipe
from pipelines.recipes.smoke import scaled

COST = {"ct": 4, "bct": 9}
"""Forward passes an image, the backward pass counted as two."""


def of_length(name: str, steps: int, seed: int) -> Config:
    config = recipe(name)
    schedule = scaled(config.schedule, steps)
    iterations = sum(schedule.curriculum_steps) or steps
    return replace(config, schedule=schedule, train=replace(config.train, iterations=iterations, seed=seed))


def trained(config: Config, model: BCM | None = None) -> Toolkit:
    """The average at the end of training, from `model` or from random weights."""
    torch.manual_seed(config.train.seed)
    state = TrainState(model or BCM(build_network(config.network)), config.train)
    for _ in fit(state, batches(uint8_images("train")[0], config.train), config.train, config.schedule):
        pass
    return Toolkit(model=state.ema, network=config.network, k=state.k, schedules=PUBLISHED[config.time_steps])


def scores(toolkit: Toolkit, real: Real) -> str:
    """A table's cells: Frechet distance over that of the test images at 1 and 2 NFE; MSE in [0, 1] at 1, 2, 4 NFE."""
    found: list[str] = []
    for nfe in (1, 2):
        samples = Moments.of(pixels(generate(toolkit, range(SAMPLES), nfe)))
        found.append(f"{frechet_distance(samples, real.moments) / real.unit:.2f}")
    for nfe in (1, 2, 4) if toolkit.network.times == 2 else ():
        again = reconstruct(toolkit, real.test, range(len(real.test)), nfe)
        found.append(f"{float(mse(again, real.test).mean()):.5f}")
    return " | ".join(found + ["-"] * (5 - len(found)))


def compared(seed: int, steps: int, real: Real) -> Iterator[tuple[str, int, float, float, str]]:
    """Name, steps, cost in thousands of forward passes of the batch, seconds and scores of each way, one by one."""
    half = steps // 2
    for name, count in (("scratch", steps), ("scratch, half", half)):
        began = time.perf_counter()
        toolkit = trained(of_length("digits", count, seed))
        yield name, count, COST["bct"] * count / 1000, time.perf_counter() - began, scores(toolkit, real)
    began = time.perf_counter()
    ict = trained(of_length("digits-ict", half, seed))
    yield "iCT, half", half, COST["ct"] * half / 1000, time.perf_counter() - began, scores(ict, real)
    model, _ = bidirectional(ict.model, ict.network)
    toolkit = trained(of_length("digits-finetune", half, seed), model)
    cost = sum(COST.values()) * half / 1000
    yield "iCT, half, and fine-tuning, half", steps, cost, time.perf_counter() - began, scores(toolkit, real)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=800, help="steps in all; half of them train the consistency model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    real = real_images()
    heads = ("seed", "way", "steps", "cost", "seconds", "Frechet/test, 1 NFE", "2 NFE", "MSE, 1 NFE", "2 NFE", "4 NFE")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for seed in options.seeds:
        for name, count, cost, seconds, cells in compared(seed, options.steps, real):
            print(f"| {seed} | {name} | {count} | {cost:.1f} | {seconds:.0f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
