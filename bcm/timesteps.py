"""The time steps of sampling and inversion: small values that know their NFE and are stored as JSON with a model."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Discriminator

from bcm.schedule import T_MAX, T_MIN
from bcm.types import BCMError


def _check_rising(kind: str, times: tuple[float, ...], at_least: int) -> None:
    if len(times) < at_least:
        raise BCMError(f"{kind}: {times} must be at least {at_least} numbers.")
    for earlier, later in itertools.pairwise(times):
        if not earlier < later:
            raise BCMError(f"{kind}: time {later} after {earlier} is out of order; list the times in rising order.")
    if times[0] < T_MIN or times[-1] > T_MAX:
        raise BCMError(f"{kind}: times {times[0]} ... {times[-1]} leave the range [{T_MIN}, {T_MAX}].")


def _check_noise_scales(kind: str, scales: tuple[float, ...], times: tuple[float, ...], t_min: float) -> None:
    if len(scales) != len(times) - 1:
        raise BCMError(f"{kind}: {len(times)} zigzag times need {len(times) - 1} noise scales, not {len(scales)}.")
    for scale, time in zip(scales, times, strict=False):
        if not t_min <= scale < time:
            raise BCMError(f"{kind}: noise scale {scale} must lie in [{t_min}, {time}), below its time step.")


@dataclass(frozen=True, kw_only=True)
class Ancestral:
    """Time steps of Algorithm 2; with two times it is one-step sampling."""

    kind: Literal["ancestral"] = "ancestral"
    times: tuple[float, ...] = (T_MIN, T_MAX)
    """t_0 < t_1 < ... < t_N = T, where t_0 stands for time 0."""

    def __post_init__(self) -> None:
        """Check order and range."""
        _check_rising(self.kind, self.times, at_least=2)

    @property
    def nfe(self) -> int:
        """Number of network calls."""
        return len(self.times) - 1


@dataclass(frozen=True, kw_only=True)
class Zigzag:
    """Time steps of Algorithm 3."""

    kind: Literal["zigzag"] = "zigzag"
    times: tuple[float, ...]
    """t_1 < ... < t_N = T."""
    noise_scales: tuple[float, ...]
    """epsilon_1 ... epsilon_{N-1}, the noise added at each turn, each below its t_n."""
    t_min: float = T_MIN
    """The time that stands for 0."""

    def __post_init__(self) -> None:
        """Check order and range."""
        _check_rising(self.kind, (self.t_min, *self.times), at_least=2)
        _check_noise_scales(self.kind, self.noise_scales, self.times, self.t_min)

    @property
    def nfe(self) -> int:
        """Number of network calls: each turn denoises and amplifies, and one call ends."""
        return 2 * len(self.times) - 1


@dataclass(frozen=True, kw_only=True)
class Combined:
    """Time steps of Algorithm 4: ancestral down to tau_M = t_1, zigzag from there."""

    kind: Literal["combined"] = "combined"
    times: tuple[float, ...]
    """t_1 < ... < t_N = T, the ancestral steps."""
    zigzag_times: tuple[float, ...]
    """tau_1 < ... < tau_{M-1}, the zigzag steps below tau_M = t_1."""
    noise_scales: tuple[float, ...]
    """epsilon_1 ... epsilon_{M-1}, each below its tau_m."""
    t_min: float = T_MIN
    """The time that stands for 0."""

    def __post_init__(self) -> None:
        """Check order and range."""
        _check_rising(self.kind, (self.t_min, *self.zigzag_times, *self.times), at_least=3)
        if len(self.times) < 2:
            raise BCMError(f"combined: times {self.times} need at least t_1 < T.")
        _check_noise_scales(self.kind, self.noise_scales, (*self.zigzag_times, self.times[0]), self.t_min)

    @property
    def nfe(self) -> int:
        """Number of network calls."""
        return len(self.times) - 1 + 2 * len(self.zigzag_times) + 1


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """Time steps of Algorithm 5."""

    kind: Literal["inversion"] = "inversion"
    times: tuple[float, ...]
    """epsilon = t_1 < ... < t_N <= T; t_1 is also the scale of the noise added to the image."""

    def __post_init__(self) -> None:
        """Check order and range."""
        _check_rising(self.kind, self.times, at_least=2)

    @property
    def nfe(self) -> int:
        """Number of network calls."""
        return len(self.times) - 1


@dataclass(frozen=True, kw_only=True)
class Multistep:
    """Time steps of a consistency model's multistep sampling (Song et al. 2023); with one time it is one step."""

    kind: Literal["multistep"] = "multistep"
    times: tuple[float, ...]
    """The mid times in rising order, then T; each but T is also the scale of the noise added there."""
    t_min: float = T_MIN
    """The time that stands for 0."""

    def __post_init__(self) -> None:
        """Check order and range."""
        _check_rising(self.kind, (self.t_min, *self.times), at_least=2)

    @property
    def nfe(self) -> int:
        """Number of network calls: one from T and one from each mid time."""
        return len(self.times)


TimeSteps = Annotated[Ancestral | Zigzag | Combined | Inversion | Multistep, Discriminator("kind")]
"""The time steps of any method of this package."""

PAPER_CIFAR10: dict[str, TimeSteps] = {
    "sample-1": Ancestral(),
    "sample-2": Ancestral(times=(T_MIN, 1.2, T_MAX)),
    "sample-3": Zigzag(times=(0.8, T_MAX), noise_scales=(0.2,)),
    "sample-4": Combined(times=(1.2, T_MAX), zigzag_times=(0.3,), noise_scales=(0.1,)),
    "invert-1": Inversion(times=(0.07, T_MAX)),
    "invert-2": Inversion(times=(0.07, 6.0, T_MAX)),
    "invert-4": Inversion(times=(0.07, 1.5, 4.0, 10.0, T_MAX)),
}
"""The paper's schedules for BCM on CIFAR-10 (Appendix C.2), by task and NFE."""

PAPER_CIFAR10_DEEP: dict[str, TimeSteps] = PAPER_CIFAR10 | {
    "sample-2": Ancestral(times=(T_MIN, 0.7, T_MAX)),
    "sample-3": Zigzag(times=(0.8, T_MAX), noise_scales=(0.4,)),
    "sample-4": Combined(times=(0.6, T_MAX), zigzag_times=(0.3,), noise_scales=(0.14,)),
}
"""The same for BCM-deep on CIFAR-10 (Appendix C.2)."""

PAPER_IMAGENET64: dict[str, TimeSteps] = {
    "sample-1": Ancestral(),
    "sample-2": Ancestral(times=(T_MIN, 2.4, T_MAX)),
    "sample-3": Zigzag(times=(1.2, T_MAX), noise_scales=(0.1,)),
    "sample-4": Combined(times=(3.0, T_MAX), zigzag_times=(0.4,), noise_scales=(0.12,)),
    "invert-1": Inversion(times=(0.07, T_MAX)),
    "invert-2": Inversion(times=(0.07, 15.0, T_MAX)),
}
"""The paper's schedules for BCM and BCM-deep on ImageNet-64 (Appendix C.2)."""

CONSISTENCY_CIFAR10: dict[str, TimeSteps] = {
    "sample-1": Ancestral(),
    "sample-2": Multistep(times=(0.821, T_MAX)),
}
"""The schedules of improved consistency training on CIFAR-10 (Song and Dhariwal 2024)."""

CONSISTENCY_IMAGENET64: dict[str, TimeSteps] = {
    "sample-1": Ancestral(),
    "sample-2": Multistep(times=(1.526, T_MAX)),
}
"""The schedules of improved consistency training on ImageNet-64 (Song and Dhariwal 2024)."""

PUBLISHED: Mapping[str, Mapping[str, TimeSteps]] = {
    "cifar10": PAPER_CIFAR10,
    "cifar10-deep": PAPER_CIFAR10_DEEP,
    "imagenet64": PAPER_IMAGENET64,
    "ct-cifar10": CONSISTENCY_CIFAR10,
    "ct-imagenet64": CONSISTENCY_IMAGENET64,
}
"""The published schedules by the name that a recipe states."""
