"""The discretisation of training: the time grid, its curriculum and the law of the time indices (Eq. 13-15)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bcm.types import BCMError

T_MIN = 0.002
"""Where the paper writes time 0, its networks see this (footnote 2)."""
T_MAX = 80.0
"""T, the time of pure noise (Section 2)."""


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

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 2 <= self.s0 <= self.s1:
            raise BCMError(f"schedule: s0={self.s0} and s1={self.s1} must hold 2 <= s0 <= s1.")
        if not (0 < self.p_std < math.inf and 0 < self.rho < math.inf and math.isfinite(self.p_mean)):
            raise BCMError(
                f"schedule: p_mean={self.p_mean} must be finite, p_std={self.p_std} and rho={self.rho} positive too."
            )
        if self.pairs not in PAIR_LAWS:
            raise BCMError(f"schedule: unknown pair law '{self.pairs}'; known are {', '.join(sorted(PAIR_LAWS))}.")


def discretization(k: int, K: int, config: ScheduleConfig) -> int:
    """N(k), the number of grid points at iteration `k` of `K` (Eq. 14)."""
    stages = math.floor(math.log2(config.s1 / config.s0)) + 1
    K_prime = max(K // stages, 1)
    return min(config.s0 * 2 ** (k // K_prime), config.s1) + 1


def time_grid(N: int, config: ScheduleConfig, device: torch.device | None = None) -> Tensor:
    """t_1 < ... < t_N, float64 (N,): index 0 holds t_1 (Eq. 15)."""
    n = torch.arange(1, N + 1, dtype=torch.float64, device=device)
    low, high = T_MIN ** (1 / config.rho), T_MAX ** (1 / config.rho)
    return (low + (n - 1) / (N - 1) * (high - low)) ** config.rho


def p_n(grid: Tensor, config: ScheduleConfig) -> Tensor:
    """p(n) for n = 1 ... N-1, float64 (N-1,), sums to 1 (Eq. 13)."""
    cdf = torch.erf((grid.log() - config.p_mean) / (math.sqrt(2) * config.p_std))
    mass = cdf.diff()
    return mass / mass.sum()


@dataclass(frozen=True)
class PairLaw:
    """How the second time of the soft-trajectory term is drawn, and how the pair is weighted."""

    mass: Callable[[Tensor, Tensor], Tensor]
    """(p(n) (N-1,), grid (N,)) -> unnormalised mass of n' before n' = n is excluded, (N-1,) or (N,)."""
    weight: Callable[[Tensor, Tensor], Tensor]
    """lambda'(t_n, t_n'), (B,) from (B,), (B,)."""


def _paper_weight(t_n: Tensor, t_prime: Tensor) -> Tensor:
    return 1 / (t_n - t_prime).abs()


def _wide_weight(t_n: Tensor, t_prime: Tensor) -> Tensor:
    return 0.1 / torch.minimum((t_n - t_prime).abs(), t_n.clamp(min=0.05))


PAIR_LAWS = {
    "paper": PairLaw(mass=lambda p, grid: p, weight=_paper_weight),
    "wide": PairLaw(mass=lambda p, grid: torch.ones_like(grid), weight=_wide_weight),
}
"""`paper`: n' ~ p(n), lambda' = 1/|t_n - t_n'| (Section 3.2). `wide`: n' uniform over the grid, its end T included,
with a mild weight, so that long jumps are trained too (docs/log.md)."""


@dataclass(frozen=True)
class TrainingTimes:
    """The times and weights of one batch; every field is float64 (B,)."""

    t_n: Tensor
    t_next: Tensor
    t_prime: Tensor
    weight_ct: Tensor
    weight_st: Tensor


def draw_times(uniforms: Tensor, N: int, config: ScheduleConfig) -> TrainingTimes:
    """Draw n ~ p(n) and n' != n by inverting their cumulative laws (Algorithm 1).

    `uniforms`: (B, 2), float64 in [0, 1). Weights: lambda(t_n) = 1 / (t_{n+1} - t_n) and lambda'(t_n, t_n').
    """
    grid = time_grid(N, config, uniforms.device)
    law = PAIR_LAWS[config.pairs]
    p = p_n(grid, config)
    n = _invert_cdf(p.cumsum(0), uniforms[:, 0].contiguous())
    q = law.mass(p, grid)
    cumulative = (q / q.sum()).cumsum(0)
    below = torch.cat([cumulative.new_zeros(1), cumulative])[n]
    gap = cumulative[n] - below
    position = uniforms[:, 1] * (1 - gap)
    n_prime = _invert_cdf(cumulative, torch.where(position < below, position, position + gap))
    n_prime = torch.where(n_prime == n, torch.where(n > 0, n - 1, n + 1), n_prime)
    t_n, t_next, t_prime = grid[n], grid[n + 1], grid[n_prime]
    return TrainingTimes(t_n, t_next, t_prime, 1 / (t_next - t_n), law.weight(t_n, t_prime))


def _invert_cdf(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    return torch.searchsorted(cumulative, uniforms, right=True).clamp(max=cumulative.numel() - 1)
