"""Times the training step against a plain one written call by call, and shows what each switch gives.

python -m benchmarks.train_step                                # the CIFAR-10 network at a quarter of its width
python -m benchmarks.train_step --width 128 --batch 128 --device cuda --peak-tflops 989 --compile
python -m benchmarks.train_step --loss                         # bf16 against fp32 over 500 steps on the digits

The plain step makes the four network calls one after the other, reseeds dropout before each, draws n' image by image in
Python over all bins, and updates its copies of the weights one by one. All variants run in turn in one process, round
by round; the figure is the median round. Peak memory on a CPU is that of a process of its own (Linux). The results are
in docs/train-step.md.
"""

import argparse
import copy
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bcm.distance import pseudo_huber
from bcm.networks import NCSNppConfig, build_network
from bcm.precond import BCM
from bcm.rng import shared_dropout
from bcm.schedule import T_MIN, ScheduleConfig, p_n, time_grid
from bcm.training import TrainConfig, TrainState, train_step
from bcm.types import from_uint8, like_images
from benchmarks.batches import Batch

SCHEDULE = ScheduleConfig(s0=1280, s1=1280)
"""The paper's last stage, N = 1281."""
SWITCHES = {
    "fp32": {},
    "fp32, optimizer tensor by tensor": {"foreach": False},
    "fp32, 2 micro-batches": {"accumulate": 2},
    "fp32, activations computed again": {"checkpoint_activations": True},
    "bf16": {"precision": "bf16"},
    "bf16, activations computed again": {"precision": "bf16", "checkpoint_activations": True},
}
COMPILED = {"fp32, compiled": {"compile": True}, "bf16, compiled": {"precision": "bf16", "compile": True}}
CUDA = {"bf16, channels last": {"precision": "bf16", "channels_last": True}}
CUDA_COMPILED = {"bf16, channels last, compiled": {"precision": "bf16", "channels_last": True, "compile": True}}
REFERENCE = "plain step"


@dataclass(frozen=True)
class Setting:
    """What all variants share."""

    network: NCSNppConfig
    batch: Batch
    device: torch.device

    def model(self) -> BCM:
        torch.manual_seed(0)
        return BCM(build_network(self.network)).to(self.device)

    def config(self, switches: dict[str, object]) -> TrainConfig:
        return replace(TrainConfig(batch_size=len(self.batch.images)), **switches)


class PlainStep:
    """Algorithm 1 as one writes it first."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.f = setting.model()
        self.f_bar = copy.deepcopy(self.f).requires_grad_(False)
        self.ema = copy.deepcopy(self.f).requires_grad_(False)
        self.optimizer = torch.optim.RAdam(self.f.parameters(), lr=1e-4)
        self.grid = time_grid(1281, SCHEDULE, setting.device)
        self.p = p_n(self.grid, SCHEDULE)
        self.k = 0

    def other_indices(self, n: Tensor) -> Tensor:
        masses = self.p.tolist()
        drawn: list[int] = []
        for own in n.tolist():
            chances = [0.0 if index == own else mass for index, mass in enumerate(masses)]
            drawn.append(random.choices(range(len(chances)), weights=chances)[0])
        return torch.tensor(drawn, device=n.device)

    def call(self, f: BCM, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
        torch.manual_seed(self.k)
        return f(x_t, t, u)

    def __call__(self) -> None:
        x = from_uint8(self.setting.batch.images.to(self.setting.device))
        z = torch.randn_like(x)
        n = torch.multinomial(self.p, len(x), replacement=True)
        t_n, t_next, t_prime = self.grid[n], self.grid[n + 1], self.grid[self.other_indices(n)]
        zero = torch.full_like(t_n, T_MIN)
        x_n, x_next = x + like_images(t_n, x) * z, x + like_images(t_next, x) * z
        x_0 = self.call(self.f, x_next, t_next, zero)
        with torch.no_grad():
            target = self.call(self.f_bar, x_n, t_n, zero)
        x_prime = self.call(self.f, x_n, t_n, t_prime)
        x_back = self.call(self.f_bar, x_prime, t_prime, zero)
        ct = pseudo_huber(x_0, target) / (t_next - t_n)
        st = pseudo_huber(x_back, target) / (t_n - t_prime).abs()
        loss = (ct + st).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for p, p_bar, p_ema in zip(
                self.f.parameters(), self.f_bar.parameters(), self.ema.parameters(), strict=True
            ):
                p_bar.copy_(p)
                p_ema.mul_(0.99993).add_(p, alpha=1 - 0.99993)
        self.k += 1


def our_step(setting: Setting, switches: dict[str, object]) -> Callable[[], object]:
    config = setting.config(switches)
    state = TrainState(setting.model(), config)
    return lambda: train_step(state, setting.batch, config, SCHEDULE)


def forward(setting: Setting) -> Callable[[], object]:
    """One training forward pass of one batch: dropout on, activations kept."""
    f, x = setting.model(), from_uint8(setting.batch.images.to(setting.device))
    t = torch.ones(len(x), dtype=torch.float64, device=x.device)

    def call() -> None:
        with shared_dropout(f, 0, rows=len(x)):
            f(x, t, t / 2)

    return call


def seconds(step: Callable[[], object], count: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def interleaved(
    steps: dict[str, Callable[[], object]], rounds: int, count: int, device: torch.device
) -> dict[str, float]:
    """The median time of each, from rounds in which each has its turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        print(f"warming up: {name}", file=sys.stderr)
        seconds(step, 2, device)
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, count, device))
    return {name: statistics.median(found) for name, found in times.items()}


def peak_memory(setting: Setting, name: str, argv: list[str]) -> float:
    """MiB that two steps need: all of it on a GPU, what they add to the process on a CPU."""
    if setting.device.type == "cuda":
        step = variants(setting, compiled=True)[name]()
        torch.cuda.reset_peak_memory_stats()
        seconds(step, 2, setting.device)
        return torch.cuda.max_memory_allocated() / 2**20
    command = [sys.executable, "-m", "benchmarks.train_step", *argv, "--memory-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory_of(setting: Setting, name: str) -> None:
    """Print the MiB by which two steps, and what they stand on, raise the peak of this process."""
    before = resident("VmRSS")
    seconds(variants(setting, compiled=True)[name](), 2, setting.device)
    print((resident("VmHWM") - before) / 2**10)


def resident(field: str) -> int:
    """KiB of this process in memory, now (VmRSS) or at most so far (VmHWM)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def variants(setting: Setting, *, compiled: bool) -> dict[str, Callable[[], Callable[[], object]]]:
    """How to make each variant's step."""
    switches: dict[str, dict[str, object]] = {**SWITCHES}
    on_gpu = setting.device.type == "cuda"
    for wanted, more in ((compiled, COMPILED), (on_gpu, CUDA), (on_gpu and compiled, CUDA_COMPILED)):
        switches |= more if wanted else {}
    ours = {name: (lambda chosen=chosen: our_step(setting, chosen)) for name, chosen in switches.items()}
    return {REFERENCE: lambda: PlainStep(setting), **ours}


def step_flops(setting: Setting) -> int:
    step = our_step(setting, {})
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def compare(setting: Setting, options: argparse.Namespace, argv: list[str]) -> None:
    makers = variants(setting, compiled=options.compile)
    steps = {name: make() for name, make in makers.items()}
    found = interleaved({"forward": forward(setting), **steps}, options.rounds, options.steps, setting.device)
    one_forward, plain = found.pop("forward"), found[REFERENCE]
    del steps
    flops, size = step_flops(setting), len(setting.batch.images)
    print(f"One training forward: {1000 * one_forward:.0f} ms for {size} images; one step: {flops / 1e9:.1f} GFLOP\n")
    print("| step | images/s | over the plain step | steps/forward | TFLOP/s | share of peak | peak memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    for name, elapsed in found.items():
        speed = flops / elapsed / 1e12
        share = f"{100 * speed / options.peak_tflops:.0f} %" if options.peak_tflops else "-"
        memory = peak_memory(setting, name, argv) if not ("compiled" in name and setting.device.type == "cpu") else None
        print(
            f"| {name} | {size / elapsed:.1f} | {plain / elapsed:.2f} | {elapsed / one_forward:.2f} | {speed:.3f} "
            f"| {share} | {'-' if memory is None else f'{memory:.0f}'} |",
            flush=True,
        )


def setting_of(options: argparse.Namespace) -> Setting:
    network = NCSNppConfig(width=options.width, blocks=options.blocks)
    shape = (options.batch, network.image_channels, network.resolution, network.resolution)
    pixels = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    batch = Batch(torch.arange(options.batch), pixels, torch.zeros(options.batch, dtype=torch.int64))
    return Setting(network, batch, torch.device(options.device))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step")
    parser.add_argument("--width", type=int, default=32, help="of the CIFAR-10 network; the paper's is 128")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="steps of each variant in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="time compiled steps too; minutes on a CPU")
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="of the device in the fastest precision used")
    parser.add_argument("--loss", action="store_true", help="compare losses instead of times")
    parser.add_argument("--loss-steps", type=int, default=500)
    parser.add_argument("--loss-N", type=int, default=0, help="grid points throughout; 0 for the recipe's stages")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.loss:
        from benchmarks.precision import compare_losses  # the rest needs only bcm, torch and NumPy

        compare_losses(options.loss_steps, options.seeds, options.loss_N)
    elif options.memory_of:
        memory_of(setting_of(options), options.memory_of)
    else:
        compare(setting_of(options), options, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
