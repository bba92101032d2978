"""The space of time steps: any form of them as numbers between 0 and 1, and back."""

import math
from collections.abc import Mapping
from dataclasses import replace

from bcm.timesteps import Ancestral, Combined, Inversion, Multistep, TimeSteps, Zigzag

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
    """The point of the space that stands for `steps`; one outside the space becomes its nearest edge."""
    first, free, last, scales = _numbers(steps)
    point = {f"time_{i + 1}": _fraction(free[i], free[i - 1] if i else first, last) for i in range(len(free))}
    if isinstance(steps, Inversion):
        point["epsilon"] = _fraction(first, *EPSILON_RANGE)
    point |= {f"noise_{i + 1}": _fraction(scale, first, free[i]) for i, scale in enumerate(scales)}
    return {name: min(max(value, EDGE), 1 - EDGE) for name, value in point.items()}


def decode(steps: TimeSteps, point: Mapping[str, float]) -> TimeSteps:
    """Time steps of the form of `steps` from a point of the space."""
    first, free, last, scales = _numbers(steps)
    if isinstance(steps, Inversion):
        first = _between(point["epsilon"], *EPSILON_RANGE)
    times: list[float] = []
    for i in range(len(free)):
        times.append(_between(point[f"time_{i + 1}"], times[-1] if times else first, last))
    noise = tuple(_between(point[f"noise_{i + 1}"], first, times[i]) for i in range(len(scales)))
    match steps:
        case Ancestral() | Inversion():
            return replace(steps, times=(first, *times, last))
        case Zigzag():
            return replace(steps, times=(*times, last), noise_scales=noise)
        case Multistep():
            return replace(steps, times=(*times, last))
        case Combined():
            cut = len(steps.zigzag_times)
            return replace(steps, zigzag_times=tuple(times[:cut]), times=(*times[cut:], last), noise_scales=noise)


def _numbers(steps: TimeSteps) -> tuple[float, tuple[float, ...], float, tuple[float, ...]]:
    """The time below the free times, the free times in rising order, the end, and the noise scales."""
    match steps:
        case Ancestral() | Inversion():
            return steps.times[0], steps.times[1:-1], steps.times[-1], ()
        case Multistep():
            return steps.t_min, steps.times[:-1], steps.times[-1], ()
        case Zigzag():
            return steps.t_min, steps.times[:-1], steps.times[-1], steps.noise_scales
        case Combined():
            return steps.t_min, (*steps.zigzag_times, *steps.times[:-1]), steps.times[-1], steps.noise_scales


def _fraction(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low)


def _between(fraction: float, low: float, high: float) -> float:
    return low * (high / low) ** fraction
