"""Inversion (Section 3.4): images to the noise that regenerates them."""

from itertools import pairwise

import torch

from bcm.samplers import one_step
from bcm.schedule import T_MIN
from bcm.timesteps import Inversion
from bcm.types import Flow, Images, Labels, at_time


@torch.no_grad()
def invert(f: Flow, x: Images, steps: Inversion, sigma: Images, label: Labels | None = None) -> Images:
    """Algorithm 5, inversion: add a little noise, then let the network amplify it step by step.

    Args:
        f: the flow.
        x: images (B, C, H, W) in [-1, 1].
        steps: epsilon = t_1 < ... < t_N.
        sigma: standard normal noise like `x`, the small initial noise.
        label: class labels (B,) or None.

    Returns:
        x_{t_N} (B, C, H, W), of standard deviation about t_N.
    """
    epsilon = steps.times[0]
    x_t = x + epsilon * sigma
    for t, u in pairwise(steps.times):
        x_t = f(x_t, at_time(t, x_t), at_time(u, x_t), label)
    return x_t


@torch.no_grad()
def reconstruct(
    f: Flow, x: Images, steps: Inversion, sigma: Images, label: Labels | None = None, *, t_min: float = T_MIN
) -> Images:
    """Invert `x` and map the noise back in one step, as the paper measures reconstruction (Appendix C.2)."""
    noise = invert(f, x, steps, sigma, label)
    return one_step(f, noise, label, t_min=t_min, T=steps.times[-1])
