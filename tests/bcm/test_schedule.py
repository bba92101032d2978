import math

import pytest
import torch

from bcm.schedule import PAIR_LAWS, ScheduleConfig, discretization, draw_times, p_n, time_grid
from bcm.types import BCMError

PAPER = ScheduleConfig()


def test_curriculum_of_the_paper():
    # CIFAR-10: 8 stages of 50,000 iterations.
    stages = [11, 21, 41, 81, 161, 321, 641, 1281]
    for j, N in enumerate(stages):
        assert discretization(50_000 * j, 400_000, PAPER) == N
        assert discretization(50_000 * (j + 1) - 1, 400_000, PAPER) == N


def test_a_rest_of_iterations_stays_in_the_last_stage():
    assert discretization(402, 403, PAPER) == 1281
    assert discretization(2, 3, PAPER) == 41


@pytest.mark.parametrize("N", [3, 11, 1281])
def test_grid_runs_from_t_min_to_t_max_on_the_karras_curve(N: int):
    grid = time_grid(N, PAPER)
    assert grid.dtype == torch.float64 and grid.shape == (N,)
    assert math.isclose(grid[0], 0.002, rel_tol=1e-12) and math.isclose(grid[-1], 80, rel_tol=1e-12)
    middle = (0.002 ** (1 / 7) + (N // 2) / (N - 1) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    assert math.isclose(grid[N // 2], middle, rel_tol=1e-12)


def test_law_of_n_is_the_lognormal_mass_of_each_interval():
    grid = time_grid(1281, PAPER)
    p = p_n(grid, PAPER)
    cdf = torch.tensor(
        [math.erf((math.log(t) + 1.1) / (math.sqrt(2) * 2.0)) for t in grid.tolist()], dtype=torch.float64
    )
    mass = cdf[1:] - cdf[:-1]
    assert p.shape == (1280,) and math.isclose(p.sum(), 1, rel_tol=1e-12)
    assert (p - mass / mass.sum()).abs().max() < 1e-12
    # Coverage figures computed independently for the paper's last stage.
    assert math.isclose(p[grid[:-1] < 0.085].sum(), 0.244, abs_tol=2e-3)
    assert math.isclose(p[grid[:-1] > 1].sum(), 0.29, abs_tol=5e-3)


@pytest.mark.parametrize("pairs", sorted(PAIR_LAWS))
def test_drawn_indices_follow_their_laws_and_never_coincide(pairs: str):
    N, B = 11, 400_000
    config = ScheduleConfig(pairs=pairs)
    grid = time_grid(N, config)
    times = draw_times(torch.rand(B, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), N, config)
    n, n_prime = torch.searchsorted(grid, times.t_n), torch.searchsorted(grid, times.t_prime)
    assert torch.equal(grid[n + 1], times.t_next)
    assert (n != n_prime).all()

    p = p_n(grid, config)
    q = PAIR_LAWS[pairs].mass(p, grid)
    joint = p[:, None] * q[None, :]
    joint[torch.arange(N - 1), torch.arange(N - 1)] = 0
    joint *= (p / joint.sum(1))[:, None]
    counts = torch.zeros_like(joint).index_put((n, n_prime), torch.ones(B, dtype=torch.float64), accumulate=True)
    spread = (B * joint * (1 - joint)).sqrt()
    assert ((counts - B * joint).abs() <= 5.5 * spread + 1e-9).all()


def test_weights_of_the_paper():
    times = draw_times(torch.rand(1000, 2, dtype=torch.float64), 41, PAPER)
    assert torch.allclose(times.weight_ct, 1 / (times.t_next - times.t_n), rtol=1e-12)
    assert torch.allclose(times.weight_st, 1 / (times.t_n - times.t_prime).abs(), rtol=1e-12)


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("pairs", sorted(PAIR_LAWS))
def test_extreme_uniforms_stay_on_the_grid(extreme: float, pairs: str):
    config = ScheduleConfig(pairs=pairs)
    for N in (3, 11, 1281):
        for other in (0.0, 0.5, 1 - 2**-53):
            uniforms = torch.tensor([[extreme, other], [other, extreme]], dtype=torch.float64)
            times = draw_times(uniforms, N, config)
            assert (times.t_prime != times.t_n).all() and times.weight_st.isfinite().all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"s0": 1},
        {"s0": 20, "s1": 10},
        {"p_mean": float("nan")},
        {"p_std": 0.0},
        {"rho": float("inf")},
        {"pairs": "wid"},
    ],
)
def test_wrong_numbers_are_refused(wrong: dict):
    with pytest.raises(BCMError, match="schedule"):
        ScheduleConfig(**wrong)
