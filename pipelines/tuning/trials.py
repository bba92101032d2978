"""The score of one trial of a search for time steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from bcm import inference
from bcm.inference import Toolkit
from bcm.metrics import Moments, mse
from bcm.timesteps import Inversion, TimeSteps
from bcm.types import Images
from pipelines.evaluation.shards import BATCH, sample_distance, sample_moments
from pipelines.tuning.space import decode

TRIAL_SEEDS = 2**40
"""Seeds of the noise of all trials; evaluation uses seeds from 0 on."""
FRESH_SEEDS = 2**41
"""Seeds of the noise on which winners are scored again."""
WORST = 1e9
"""What a trial reports whose images are not finite: a number, for the search learns nothing from infinity."""


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
    if not isinstance(steps, Inversion):
        toolkit = replace(trials.toolkit, schedules={f"sample-{steps.nfe}": steps})
        seeds = list(range(first_seed, first_seed + trials.samples))
        return sample_distance(sample_moments(toolkit, seeds, steps.nfe), trials.train)
    toolkit = replace(trials.toolkit, schedules={f"invert-{steps.nfe}": steps})
    errors: list[torch.Tensor] = []
    for start in range(0, len(trials.labels), BATCH):
        x, labels = trials.x[start : start + BATCH], trials.labels[start : start + BATCH]
        seeds = range(first_seed + start, first_seed + start + len(labels))
        images = inference.reconstruct(toolkit, x, seeds, steps.nfe, labels if toolkit.network.classes else None)
        errors.append(mse(images, x))
    return float(torch.cat(errors).mean())


def trial(point: Mapping[str, float], trials: Trials, steps: TimeSteps) -> None:
    """One Ray Tune trial: score one point of the space; every trial sees the same noise."""
    from ray import tune

    torch.set_num_threads(1)
    value = score(trials, decode(steps, point), first_seed=TRIAL_SEEDS)
    tune.report({"score": value if math.isfinite(value) else WORST})
