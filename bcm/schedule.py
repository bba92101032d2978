"""The times of training: the grid, its curriculum, the law of the indices (Eq. 13-15), and diffusion's noise levels."""

import bisect
import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from bcm.pairs import PAIR_LAWS, mass
from bcm.types import BCMError

T_MIN = 0.002
"""Where the paper writes time 0, its networks see this (footnote 2)."""
T_MAX = 80.0
"""T, the time of pure noise (Section 2)."""
N_MAX = 20_481
"""Most points of a grid: beyond it t_2 - t_1 is below 2.5e-6, a few float32 spacings of a pixel."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The numbers of Eq. 13-15; the defaults are the paper's (Appendix C.1)."""

    s0: int = 10
    """Intervals of the time grid in the first stage; doubled from stage to stage."""
    s1: int = 1280
    """Intervals of the time grid in the last stage."""
    p_mean: float = -1.1
    """P_mean of p(n), in log time."""
    p_std: float = 2.0
    """P_std of p(n), in log time."""
    rho: float = 7.0
    """Curvature of the time grid."""
    pairs: str = "paper"
    """The law of n' and its weight lambda', a name in `PAIR_LAWS`."""
    curriculum_N: tuple[int, ...] = ()
    """Grid points N of each stage, growing; empty for those of Eq. 14."""
    curriculum_steps: tuple[int, ...] = ()
    """Iterations of each stage, as many as `curriculum_N`; the last stage goes on to the end of training."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 2 <= self.s0 <= self.s1 < N_MAX:
            raise BCMError(f"schedule: s0={self.s0} and s1={self.s1} must hold 2 <= s0 <= s1 < {N_MAX}.")
        if not (0 < self.p_std < math.inf and 0 < self.rho < math.inf and math.isfinite(self.p_mean)):
            raise BCMError(
                f"schedule: p_mean={self.p_mean} must be finite, p_std={self.p_std} and rho={self.rho} positive too."
            )
        if self.pairs not in PAIR_LAWS:
            raise BCMError(f"schedule: unknown pair law '{self.pairs}'; known are {', '.join(sorted(PAIR_LAWS))}.")
        points, steps = self.curriculum_N, self.curriculum_steps
        if len(points) != len(steps):
            raise BCMError(
                f"schedule: curriculum_N has {len(points)} stages and curriculum_steps {len(steps)}; "
                "give one number of iterations for each N."
            )
        if points and not 3 <= points[0] <= points[-1] <= N_MAX:
            raise BCMError(f"schedule: curriculum_N={points} leaves the grid; each N lies in 3 ... {N_MAX}.")
        if any(a >= b for a, b in pairwise(points)):
            raise BCMError(f"schedule: curriculum_N={points} must grow from stage to stage.")
        if any(count < 1 for count in steps):
            raise BCMError(f"schedule: curriculum_steps={steps} has an empty stage; leave that stage out of both.")


def discretization(k: int, K: int, config: ScheduleConfig) -> int:
    """N(k), the number of grid points at iteration `k` of `K`: Eq. 14, or the stages that `config` lists.

    Raises:
        BCMError: `K` iterations do not reach the last of the listed stages.
    """
    if config.curriculum_N:
        ends = list(accumulate(config.curriculum_steps[:-1]))
        last = sum(config.curriculum_steps[:-1])
        if last >= K:
            raise BCMError(
                f"schedule: the stage of N={config.curriculum_N[-1]} starts after {last} iterations, but training "
                f"has {K}, so it would be empty. Raise train.iterations, or shorten schedule.curriculum-steps."
            )
        return config.curriculum_N[bisect.bisect_right(ends, k)]
    stages = math.floor(math.log2(config.s1 / config.s0)) + 1
    K_prime = max(K // stages, 1)
    return min(config.s0 * 2 ** (k // K_prime), config.s1) + 1


def time_grid(N: int, config: ScheduleConfig, device: torch.device | None = None) -> Tensor:
    """t_1 < ... < t_N, float64 (N,): index 0 holds t_1 (Eq. 15). An `N` outside 3 ... `N_MAX` raises `BCMError`."""
    if not 3 <= N <= N_MAX:
        raise BCMError(f"N={N} is beyond the time grid; choose N in 3 ... {N_MAX}.")
    n = torch.arange(1, N + 1, dtype=torch.float64, device=device)
    low, high = T_MIN ** (1 / config.rho), T_MAX ** (1 / config.rho)
    return (low + (n - 1) / (N - 1) * (high - low)) ** config.rho


def p_n(grid: Tensor, config: ScheduleConfig) -> Tensor:
    """p(n) for n = 1 ... N-1, float64 (N-1,), sums to 1 (Eq. 13)."""
    cdf = torch.erf((grid.log() - config.p_mean) / (math.sqrt(2) * config.p_std))
    mass = cdf.diff()
    return mass / mass.sum()


@dataclass(frozen=True)
class TrainingTimes:
    """The times and weights of one batch; every field is float64 (B,)."""

    t_n: Tensor
    t_next: Tensor
    t_prime: Tensor
    weight_ct: Tensor
    weight_st: Tensor


def draw_times(uniforms: Tensor, N: int, config: ScheduleConfig, *, start_next: bool = False) -> TrainingTimes:
    """Draw n ~ p(n) and n' != n by inverting their cumulative laws (Algorithm 1).

    `uniforms`: (B, 2), float64 in [0, 1). Weights: lambda(t_n) = 1 / (t_{n+1} - t_n) and lambda'(t_n, t_n').

    `start_next` is the official code's variant, whose soft trajectories start at t_{n+1}: n' != n+1, the weight is
    lambda'(t_{n+1}, t_n'), and n and n' end at N-2.
    """
    grid = time_grid(N, config, uniforms.device)
    p = p_n(grid, config)
    p = p[:-1] / p[:-1].sum() if start_next else p
    n = _invert_cdf(p.cumsum(0), uniforms[:, 0].contiguous())
    start = n + 1 if start_next else n
    q = mass(config.pairs, p, grid)
    cumulative = (q / q.sum()).cumsum(0)
    edges = torch.cat([cumulative.new_zeros(1), cumulative, cumulative[-1:]])
    below, gap = edges[start], edges[start + 1] - edges[start]
    position = uniforms[:, 1] * (1 - gap)
    n_prime = _invert_cdf(cumulative, torch.where(position < below, position, position + gap))
    n_prime = torch.where(n_prime == start, torch.where(start > 0, start - 1, start + 1), n_prime)
    t_n, t_next, t_prime = grid[n], grid[n + 1], grid[n_prime]
    weight_st = PAIR_LAWS[config.pairs](grid[start], t_prime)
    return TrainingTimes(t_n, t_next, t_prime, 1 / (t_next - t_n), weight_st)


def _invert_cdf(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    return torch.searchsorted(cumulative, uniforms, right=True).clamp(max=cumulative.numel() - 1)


EDM_P_MEAN = -1.2
"""Mean of ln sigma in the diffusion baseline (Karras et al., 2022)."""
EDM_P_STD = 1.2
"""Standard deviation of ln sigma in the diffusion baseline (Karras et al., 2022)."""


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels and weights of one batch of the diffusion baseline; every field is float64 (B,)."""

    sigma: Tensor
    weight: Tensor


def draw_noise_levels(uniforms: Tensor, sigma_data: float) -> NoiseLevels:
    """Draw lognormal sigma by inverting the normal law, and EDM's weight (Karras et al., 2022, Table 1).

    `uniforms`: (B, at least 1), float64 in [0, 1); the first column is used.
    """
    normal = math.sqrt(2) * torch.erfinv((2 * uniforms[:, 0] - 1).clamp(min=-1 + 2.0**-53))
    sigma = (EDM_P_MEAN + EDM_P_STD * normal).exp()
    return NoiseLevels(sigma, (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2)
