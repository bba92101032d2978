"""The search for time steps: their space, and the score of one trial."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from bcm import inference
from bcm.inference import Toolkit
from bcm.metrics import Moments, mse
from bcm.timesteps import Ancestral, Combined, Inversion, Multistep, TimeSteps, Zigzag
from bcm.types import Images
from pipelines.evaluation.scoring import BATCH, sample_distance, sample_moments

EPSILON_RANGE = (0.01, 0.5)
"""Where the first time of an inversion is searched."""
EDGE = 0.02
"""Searched fractions stay this far from 0 and 1, so that times stay distinct."""


def space(steps: TimeSteps) -> dict[str, tuple[float, float]]:
    """Names and ranges of the numbers that `decode` turns into time steps of the form of `steps`.

    Each free time is a fraction of the log range between the time below and the end, each noise scale a fraction of the
    log range between 0's time and its time step; so every point of the space is in order and in range.
    """
    return dict.fromkeys(encode(steps), (EDGE, 1 - EDGE))


def encode(steps: TimeSteps) -> dict[str, float]:
    """The point of the space that stands for `steps`."""
    low, free, high, scales, t_min = _parts(steps)
    values: dict[str, float] = {}
    for i, time in enumerate(free):
        values[f"time_{i + 1}"] = _fraction(time, low, high)
        low = time
    if isinstance(steps, Inversion):
        values["epsilon"] = _fraction(steps.times[0], *EPSILON_RANGE)
    for i, (scale, time) in enumerate(zip(scales, free, strict=False)):
        values[f"noise_{i + 1}"] = _fraction(scale, t_min, time)
    return {name: min(max(value, EDGE), 1 - EDGE) for name, value in values.items()}


def decode(steps: TimeSteps, values: dict[str, float]) -> TimeSteps:
    """Time steps of the form of `steps` from a point of the space."""
    low, free, high, scales, t_min = _parts(steps)
    if isinstance(steps, Inversion):
        low = _between(values["epsilon"], *EPSILON_RANGE)
    first, times = low, []
    for i in range(len(free)):
        low = _between(values[f"time_{i + 1}"], low, high)
        times.append(low)
    noise = tuple(_between(values[f"noise_{i + 1}"], t_min, times[i]) for i in range(len(scales)))
    match steps:
        case Ancestral():
            return Ancestral(times=(first, *times, high))
        case Inversion():
            return Inversion(times=(first, *times, high))
        case Zigzag():
            return replace(steps, times=(*times, high), noise_scales=noise)
        case Multistep():
            return replace(steps, times=(*times, high))
        case Combined():
            cut = len(steps.zigzag_times)
            return replace(steps, zigzag_times=tuple(times[:cut]), times=(*times[cut:], high), noise_scales=noise)


def _parts(steps: TimeSteps) -> tuple[float, tuple[float, ...], float, tuple[float, ...], float]:
    """Time below the free times, the free times, the time above, noise scales, and 0's time."""
    match steps:
        case Ancestral() | Inversion():
            return steps.times[0], steps.times[1:-1], steps.times[-1], (), steps.times[0]
        case Zigzag():
            return steps.t_min, steps.times[:-1], steps.times[-1], steps.noise_scales, steps.t_min
        case Multistep():
            return steps.t_min, steps.times[:-1], steps.times[-1], (), steps.t_min
        case Combined():
            free = (*steps.zigzag_times, *steps.times[:-1])
            return steps.t_min, free, steps.times[-1], steps.noise_scales, steps.t_min


def _fraction(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low)


def _between(fraction: float, low: float, high: float) -> float:
    return low * (high / low) ** fraction


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What the trials of one search share; sent to each node once."""

    toolkit: Toolkit
    """The frozen model."""
    train: Moments
    """Pixel moments of the training images, for sampling."""
    x: Images
    """Training images to invert, (B, C, H, W)."""
    labels: tuple[int, ...]
    """Their labels."""
    samples: int
    """Samples of a trial."""


def score(trials: Trials, steps: TimeSteps, first_seed: int) -> float:
    """Frechet distance of samples, or error of reconstructions, with the noise of the seeds from `first_seed` on."""
    name = f"{'invert' if isinstance(steps, Inversion) else 'sample'}-{steps.nfe}"
    toolkit = replace(trials.toolkit, schedules={name: steps})
    if isinstance(steps, Inversion):
        errors: list[torch.Tensor] = []
        for start in range(0, len(trials.labels), BATCH):
            labels = trials.labels[start : start + BATCH]
            seeds = range(first_seed + start, first_seed + start + len(labels))
            x = trials.x[start : start + BATCH]
            found = inference.reconstruct(
                toolkit, x, list(seeds), steps.nfe, labels if toolkit.network.classes else None
            )
            errors.append(mse(found, x))
        return float(torch.cat(errors).mean())
    seeds = list(range(first_seed, first_seed + trials.samples))
    return sample_distance(sample_moments(toolkit, seeds, steps.nfe), trials.train)


def trial(values: dict[str, float], trials: Trials, steps: TimeSteps) -> None:
    """One Ray Tune trial: score one point of the space; every trial sees the same noise."""
    from ray import tune

    torch.set_num_threads(1)
    found = score(trials, decode(steps, values), first_seed=TRIAL_SEEDS)
    tune.report({"score": found if np.isfinite(found) else 1e9})


TRIAL_SEEDS = 2**40
"""Seeds of the noise of all trials; evaluation uses seeds from 0 on."""
FRESH_SEEDS = 2**41
"""Seeds of the noise on which winners are scored again."""
