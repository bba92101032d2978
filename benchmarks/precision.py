"""Compares the loss of bf16 training with fp32's on the digits: `python -m benchmarks.train_step --loss`."""

import statistics
from dataclasses import replace

import torch

from bcm.networks import build_network
from bcm.precond import BCM
from bcm.training import TrainState, train_step
from benchmarks.batches import batches
from benchmarks.on_digits import uint8_images
from pipelines.recipes import recipe


def compare_losses(steps: int, seeds: int, N: int) -> None:
    """Mean loss of the last fifth of training on digits, fp32 and bf16 from the same seeds; N = 0 for all stages."""
    train, _ = uint8_images("train")
    print("| seed | fp32 | bf16 | bf16 over fp32 |")
    print("|---|---|---|---|")
    means: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for seed in range(seeds):
        for precision, found in means.items():
            config = recipe("digits")
            chosen = replace(config.train, precision=precision, seed=seed, iterations=steps)
            schedule = replace(config.schedule, s0=N - 1, s1=N - 1) if N else config.schedule
            torch.manual_seed(seed)
            state = TrainState(BCM(build_network(config.network)), chosen)
            stream = batches(train, chosen)
            losses = [train_step(state, next(stream), chosen, schedule).losses for _ in range(steps)]
            found.append(statistics.fmean(float(sum(step.values())) for step in losses[-max(steps // 5, 1) :]))
        a, b = means["fp32"][-1], means["bf16"][-1]
        print(f"| {seed} | {a:.4f} | {b:.4f} | {b / a:.4f} |", flush=True)
    noise = statistics.stdev(means["fp32"]) / statistics.fmean(means["fp32"]) if seeds > 1 else float("nan")
    ratio = statistics.fmean(means["bf16"]) / statistics.fmean(means["fp32"])
    print(f"\nbf16 over fp32: {ratio:.4f}; standard deviation of fp32 over seeds: {100 * noise:.1f} %")
