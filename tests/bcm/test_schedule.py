import math
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from mpmath import erf, log, mp, mpf, sqrt

from bcm.distance import official_huber, pseudo_huber
from bcm.schedule import (
    N_MAX,
    ScheduleConfig,
    discretization,
    draw_noise_levels,
    draw_times,
    p_n,
    time_grid,
)
from bcm.types import BCMError

PAPER = ScheduleConfig()
DOUBLING = (11, 21, 41, 81, 161, 321, 641, 1281)
LSUN_STEPS = (75_000, 75_000, 60_000, 60_000, 45_000, 45_000, 30_000, 30_000)
TUNING = (320, 480, 640)
STAGES: dict[str, tuple[ScheduleConfig, int, tuple[int, ...], tuple[int, ...], int]] = {
    "cifar10": (PAPER, 400_000, DOUBLING, (50_000,) * 8, 32),
    "ffhq64": (PAPER, 400_000, DOUBLING, (50_000,) * 8, 64),
    "lsun256": (
        ScheduleConfig(curriculum_N=DOUBLING, curriculum_steps=LSUN_STEPS),
        420_000,
        DOUBLING,
        LSUN_STEPS,
        256,
    ),
    "imagenet64-ict": (PAPER, 800_000, DOUBLING, (100_000,) * 8, 64),
    "imagenet64-bcm": (
        ScheduleConfig(curriculum_N=TUNING, curriculum_steps=(210_000, 16_000, 8_000)),
        234_000,
        TUNING,
        (210_000, 16_000, 8_000),
        64,
    ),
    "imagenet64-bcm-deep": (
        ScheduleConfig(curriculum_N=TUNING, curriculum_steps=(360_000, 100_000, 10_000)),
        470_000,
        TUNING,
        (360_000, 100_000, 10_000),
        64,
    ),
}
"""The paper's recipes (Appendix C.1): schedule, K, N and iterations of each stage, pixels of a side."""


@pytest.mark.parametrize("name", STAGES)
def test_curriculum_of_each_recipe(name: str):
    config, K, points, steps, _ = STAGES[name]
    first = 0
    for N, end in zip(points, accumulate(steps), strict=True):
        assert {discretization(k, K, config) for k in (first, first + 1, end - 1)} == {N}
        first = end
    assert first == K


def exact_grid(N: int) -> list[Any]:
    """Eq. 15 in 40 digits."""
    with mp.workdps(40):
        low, high = mpf("0.002") ** (mpf(1) / 7), mpf(80) ** (mpf(1) / 7)
        return [(low + mpf(i) / (N - 1) * (high - low)) ** 7 for i in range(N)]


def exact_law(grid: list[Any]) -> list[Any]:
    """Eq. 13 in 40 digits."""
    with mp.workdps(40):
        cdf = [erf((log(t) + mpf("1.1")) / (sqrt(mpf(2)) * 2)) for t in grid]
        total = cdf[-1] - cdf[0]
        return [(b - a) / total for a, b in pairwise(cdf)]


@pytest.mark.parametrize("N", sorted({N for _, _, points, _, _ in STAGES.values() for N in (points[0], points[-1])}))
def test_grid_law_and_weights_of_first_and_last_stages_in_40_digits(N: int):
    exact = exact_grid(N)
    grid = time_grid(N, PAPER)
    assert grid.dtype == torch.float64 and grid.shape == (N,)
    assert all(math.isclose(t, e, rel_tol=1e-13) for t, e in zip(grid.tolist(), exact, strict=True))
    p = p_n(grid, PAPER)
    assert p.shape == (N - 1,) and math.isclose(p.sum(), 1, rel_tol=1e-13)
    # The law is a difference of error functions, so its error is absolute.
    assert all(math.isclose(a, e, abs_tol=1e-14) for a, e in zip(p.tolist(), exact_law(exact), strict=True))
    u = torch.cat([torch.linspace(0, 1, 201, dtype=torch.float64)[:-1, None]] * 2, dim=1)
    times = draw_times(u, N, PAPER)
    n = torch.searchsorted(grid, times.t_n).tolist()
    n_prime = torch.searchsorted(grid, times.t_prime).tolist()
    for i, (a, b) in enumerate(zip(n, n_prime, strict=True)):
        assert math.isclose(times.weight_ct[i], 1 / (exact[a + 1] - exact[a]), rel_tol=1e-11)
        assert math.isclose(times.weight_st[i], 1 / abs(exact[a] - exact[b]), rel_tol=1e-11)


def test_largest_weights_of_the_first_and_the_last_stage():
    assert 1 / time_grid(11, PAPER).diff()[0] == pytest.approx(68, abs=0.5)
    assert 1 / time_grid(1281, PAPER).diff()[0] == pytest.approx(2.6e4, rel=0.02)


@pytest.mark.parametrize(("pixels", "c"), [(32, 0.0299), (64, 0.0599), (256, 0.2394)])
def test_c_of_each_resolution(pixels: int, c: float):
    assert {entry[-1] for entry in STAGES.values()} == {32, 64, 256}
    x = torch.zeros(1, 3, pixels, pixels, dtype=torch.float64)
    far = torch.full_like(x, 1e6)
    # Far away the distance is the norm less c.
    assert float((far - x).norm() - pseudo_huber(x, far)) == pytest.approx(c, abs=1e-4)
    norm = (3 * pixels**2) ** 0.5
    assert float(official_huber(x, x + 1)) == pytest.approx(((norm**2 + 0.0036) ** 0.5 - 0.06) / norm, rel=1e-12)


def test_a_rest_of_iterations_stays_in_the_last_stage():
    assert discretization(402, 403, PAPER) == 1281
    assert discretization(2, 3, PAPER) == 41
    config = ScheduleConfig(curriculum_N=(11, 21), curriculum_steps=(3, 4))
    assert [discretization(k, 9, config) for k in range(9)] == [11] * 3 + [21] * 6


def test_a_stage_that_training_never_reaches_is_an_error():
    config = ScheduleConfig(curriculum_N=(11, 21, 41), curriculum_steps=(3, 4, 2))
    assert discretization(7, 8, config) == 41
    with pytest.raises(BCMError, match="N=41 starts after 7 iterations, but training has 7"):
        discretization(0, 7, config)


@pytest.mark.parametrize("N", [2, N_MAX + 1])
def test_points_beyond_the_grid_are_an_error(N: int):
    with pytest.raises(BCMError, match=f"N={N} is beyond the time grid"):
        time_grid(N, PAPER)


def test_coverage_of_the_last_stage():
    grid = time_grid(1281, PAPER)
    p = p_n(grid, PAPER)
    # Figures computed independently.
    assert math.isclose(p[grid[:-1] < 0.085].sum(), 0.244, abs_tol=2e-3)
    assert math.isclose(p[grid[:-1] > 1].sum(), 0.29, abs_tol=5e-3)


def test_the_official_codes_indices_follow_their_law():
    N, B = 11, 200_000
    grid = time_grid(N, PAPER)
    uniforms = torch.rand(B, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = draw_times(uniforms, N, PAPER, start_next=True)
    n, n_prime = torch.searchsorted(grid, times.t_n), torch.searchsorted(grid, times.t_prime)
    p = p_n(grid, PAPER)[:-1]  # n and n' = 1 ... N-2
    joint = (p / p.sum())[:, None] * p[None, :]
    for row in range(N - 3):
        joint[row, row + 1] = 0  # n' = n + 1 is the start of the trajectory
    joint *= ((p / p.sum()) / joint.sum(1))[:, None]
    counts = torch.zeros_like(joint).index_put((n, n_prime), torch.ones(B, dtype=torch.float64), accumulate=True)
    assert ((counts - B * joint).abs() <= 5.5 * (B * joint * (1 - joint)).sqrt() + 1e-9).all()
    assert torch.allclose(times.weight_st, 1 / (times.t_next - times.t_prime).abs(), rtol=1e-12)


@pytest.mark.parametrize("N", [3, 4, 1281])
def test_the_official_codes_indices_stay_on_the_grid(N: int):
    edges = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    times = draw_times(torch.cartesian_prod(edges, edges), N, PAPER, start_next=True)
    assert (times.t_prime != times.t_next).all() and times.weight_st.isfinite().all()


def test_noise_levels_of_the_diffusion_baseline():
    u = torch.tensor([0.0, 0.15865525393145707, 0.5, 0.9772498680518208, 1 - 2**-53], dtype=torch.float64)
    levels = draw_noise_levels(torch.stack([u, u], dim=1), 0.5)
    assert torch.allclose(levels.sigma[1:4].log(), torch.tensor([-2.4, -1.2, 1.2], dtype=torch.float64), rtol=1e-7)
    sigma = math.exp(-1.2)
    assert levels.weight[2] == pytest.approx((sigma**2 + 0.25) / (0.5 * sigma) ** 2, rel=1e-12)
    assert levels.sigma.isfinite().all() and (levels.sigma > 0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"s0": 1},
        {"s0": 20, "s1": 10},
        {"p_mean": float("nan")},
        {"p_std": 0.0},
        {"rho": float("inf")},
        {"pairs": "wid"},
        {"s1": N_MAX},
        {"curriculum_N": (320, 480), "curriculum_steps": (10,)},
        {"curriculum_steps": (10,)},
        {"curriculum_N": (320, 320), "curriculum_steps": (10, 10)},
        {"curriculum_N": (2, 320), "curriculum_steps": (10, 10)},
        {"curriculum_N": (320, N_MAX + 1), "curriculum_steps": (10, 10)},
        {"curriculum_N": (320, 480), "curriculum_steps": (10, 0)},
    ],
)
def test_wrong_numbers_are_refused(wrong: dict):
    with pytest.raises(BCMError, match="schedule"):
        ScheduleConfig(**wrong)
