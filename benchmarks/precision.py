"""What low precision does to training on the digits, in two measurements.

python -m benchmarks.train_step --loss [--loss-N 1281]     # the loss, bf16 against fp32 from the same seeds
python -m benchmarks.precision                             # rounding, against what the loss has to see

Consistency training compares the network at neighbouring times. The second measurement is the error that autocast makes
in that difference, as a multiple of the difference itself, at N = 1281 after a short training in fp32.
"""

import statistics
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from bcm.networks import build_network
from bcm.precond import BCM
from bcm.schedule import T_MIN, time_grid
from bcm.training import TrainState, train_step
from bcm.types import Images, at_time, from_uint8
from benchmarks.batches import batches
from benchmarks.on_digits import uint8_images
from pipelines.recipes import recipe

FINEST = 1281
"""The paper's last N."""
POINTS = (50, 200, 400, 600, 800, 1000, 1200, 1279)
"""Where on the grid the difference is looked at."""
STEPS, IMAGES = 250, 128


def compare_losses(steps: int, seeds: int, N: int) -> None:
    """Mean loss of the last fifth of training on digits, fp32 and bf16 from the same seeds; N = 0 for all stages."""
    print("| seed | fp32 | bf16 | bf16 over fp32 |")
    print("|---|---|---|---|")
    means: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for seed in range(seeds):
        for precision, found in means.items():
            _, losses = trained(steps, seed, N, precision)
            found.append(statistics.fmean(losses[-max(steps // 5, 1) :]))
        a, b = means["fp32"][-1], means["bf16"][-1]
        print(f"| {seed} | {a:.4f} | {b:.4f} | {b / a:.4f} |", flush=True)
    noise = statistics.stdev(means["fp32"]) / statistics.fmean(means["fp32"]) if seeds > 1 else float("nan")
    ratio = statistics.fmean(means["bf16"]) / statistics.fmean(means["fp32"])
    print(f"\nbf16 over fp32: {ratio:.4f}; standard deviation of fp32 over seeds: {100 * noise:.1f} %")


def trained(steps: int, seed: int, N: int, precision: str) -> tuple[BCM, list[float]]:
    """The model after some steps of the digits recipe, and the loss of each."""
    config = recipe("digits")
    train = replace(config.train, precision=precision, seed=seed, iterations=steps)
    schedule = replace(config.schedule, s0=N - 1, s1=N - 1) if N else config.schedule
    torch.manual_seed(seed)
    state = TrainState(BCM(build_network(config.network)), train)
    stream = batches(uint8_images("train")[0], train)
    losses = [train_step(state, next(stream), train, schedule).losses for _ in range(steps)]
    return state.model, [float(sum(step.values())) for step in losses]


@torch.no_grad()
def difference(f: BCM, x: Images, z: Images, times: Tensor, precision: torch.dtype | None) -> Tensor:
    """The flow to t_min from the second time less that from the first, on one path."""
    with torch.autocast("cpu", precision) if precision else nullcontext():
        low, high = (f(x + float(t) * z, at_time(float(t), x), at_time(T_MIN, x)) for t in times)
    return (high - low).double()


def main() -> None:
    torch.set_num_threads(1)
    f = trained(STEPS, 0, FINEST, "fp32")[0].eval()
    x = from_uint8(uint8_images("train")[0][:IMAGES])
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    grid = time_grid(FINEST, recipe("digits").schedule)
    print("| n | t_n | difference (rms) | error of bf16 / difference | error of fp16 / difference |")
    print("|---|---|---|---|---|")
    for n in POINTS:
        exact = difference(f, x, z, grid[n : n + 2], None)
        errors = [difference(f, x, z, grid[n : n + 2], kind) - exact for kind in (torch.bfloat16, torch.float16)]
        cells = " | ".join(f"{float(error.norm() / exact.norm()):.2f}" for error in errors)
        print(f"| {n} | {float(grid[n]):.3g} | {float(exact.square().mean().sqrt()):.2g} | {cells} |")


if __name__ == "__main__":
    main()
