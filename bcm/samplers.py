"""Sampling (Section 3.3): noise to images with a handful of network calls."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch

from bcm.schedule import T_MAX, T_MIN
from bcm.timesteps import Ancestral, Combined, Inversion, Multistep, TimeSteps, Zigzag
from bcm.types import BCMError, Flow, Images, Labels, at_time

FreshNoise = Callable[[int], Images]
"""k -> the k-th fresh standard normal noise (B, C, H, W) of a sampler."""


@torch.no_grad()
def one_step(f: Flow, x_T: Images, label: Labels | None = None, *, t_min: float = T_MIN, T: float = T_MAX) -> Images:
    """One-step sampling: x_0 = f(x_T, T, 0). `x_T` (B, C, H, W) has standard deviation T."""
    return f(x_T, at_time(T, x_T), at_time(t_min, x_T), label)


@torch.no_grad()
def ancestral(f: Flow, x_T: Images, steps: Ancestral, label: Labels | None = None) -> Images:
    """Algorithm 2, ancestral sampling: walk down the time steps."""
    x = x_T
    for t, u in pairwise(reversed(steps.times)):
        x = f(x, at_time(t, x), at_time(u, x), label)
    return x


@torch.no_grad()
def zigzag(f: Flow, x_T: Images, steps: Zigzag, noise: FreshNoise, label: Labels | None = None) -> Images:
    """Algorithm 3, zigzag sampling: denoise, add a little fresh noise, let the network amplify it (Eq. 11)."""
    x_t, t = x_T, steps.times[-1]
    for n in range(len(steps.times) - 2, -1, -1):
        epsilon, t_below = steps.noise_scales[n], steps.times[n]
        x = f(x_t, at_time(t, x_t), at_time(steps.t_min, x_t), label)
        x_epsilon = x + epsilon * noise(n)
        x_t = f(x_epsilon, at_time(epsilon, x), at_time(t_below, x), label)
        t = t_below
    return f(x_t, at_time(t, x_t), at_time(steps.t_min, x_t), label)


@torch.no_grad()
def combined(f: Flow, x_T: Images, steps: Combined, noise: FreshNoise, label: Labels | None = None) -> Images:
    """Algorithm 4: ancestral sampling down to t_1, then zigzag sampling from tau_M = t_1."""
    x_t1 = ancestral(f, x_T, Ancestral(times=steps.times), label)
    taus = (*steps.zigzag_times, steps.times[0])
    return zigzag(f, x_t1, Zigzag(times=taus, noise_scales=steps.noise_scales, t_min=steps.t_min), noise, label)


@torch.no_grad()
def multistep(f: Flow, x_T: Images, steps: Multistep, noise: FreshNoise, label: Labels | None = None) -> Images:
    """Multistep consistency sampling (Song et al. 2023, Alg. 1): to 0, back up by fresh noise alone, to 0 again.

    `f` is only asked for u = 0, so a model of one time will do.
    """
    x = f(x_T, at_time(steps.times[-1], x_T), at_time(steps.t_min, x_T), label)
    for n in range(len(steps.times) - 2, -1, -1):
        tau = steps.times[n]
        x_tau = x + math.sqrt(tau**2 - steps.t_min**2) * noise(n)
        x = f(x_tau, at_time(tau, x), at_time(steps.t_min, x), label)
    return x


def sample(f: Flow, z: Images, steps: TimeSteps, noise: FreshNoise, label: Labels | None = None) -> Images:
    """Sample by whichever algorithm `steps` belongs to, from standard normal `z` (B, C, H, W)."""
    match steps:
        case Ancestral():
            return ancestral(f, steps.times[-1] * z, steps, label)
        case Zigzag():
            return zigzag(f, steps.times[-1] * z, steps, noise, label)
        case Combined():
            return combined(f, steps.times[-1] * z, steps, noise, label)
        case Multistep():
            return multistep(f, steps.times[-1] * z, steps, noise, label)
        case Inversion():
            raise BCMError(f"{steps} inverts images; sampling needs ancestral, zigzag, combined or multistep ones.")
