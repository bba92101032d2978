import math

import pytest
import torch
from torch import Tensor

from bcm.pairs import PAIR_LAWS, joint
from bcm.precond import scalings
from bcm.schedule import T_MAX, ScheduleConfig, TrainingTimes, draw_times, p_n, time_grid

PAPER = ScheduleConfig()
LAWS = sorted(PAIR_LAWS)
BEYOND = [name for name in LAWS if name != "paper"]
every_law = pytest.mark.parametrize("pairs", LAWS)


def drawn(count: int, N: int, pairs: str) -> TrainingTimes:
    uniforms = torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return draw_times(uniforms, N, ScheduleConfig(pairs=pairs))


def law_of_pairs(N: int, pairs: str) -> tuple[Tensor, Tensor]:
    """The probabilities of all pairs, and the grid."""
    grid = time_grid(N, PAPER)
    return joint(pairs, p_n(grid, PAPER), grid), grid


def long_jumps(t: Tensor, u: Tensor) -> Tensor:
    """Which pairs are those of a one-step inversion."""
    return (t > 0.05) & (t < 0.1) & (u > 60)


@every_law
@pytest.mark.parametrize("N", [3, 11, 1281])
def test_pairs_have_probabilities_that_sum_to_one_without_the_diagonal(N: int, pairs: str):
    chances, grid = law_of_pairs(N, pairs)
    assert chances.shape[0] == N - 1 and (chances >= 0).all()
    assert math.isclose(chances.sum(), 1, rel_tol=1e-12)
    assert not chances.diagonal().any()
    # n itself follows p(n) whatever the law of n'.
    assert torch.allclose(chances.sum(1), p_n(grid, PAPER), rtol=1e-12, atol=0)


def test_a_pair_of_the_paper_by_hand():
    p, grid = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.arange(4, dtype=torch.float64)
    by_hand = [[0, 0.3, 0.2], [0.3 * 0.5 / 0.7, 0, 0.3 * 0.2 / 0.7], [0.2 * 0.5 / 0.8, 0.2 * 0.3 / 0.8, 0]]
    assert torch.allclose(joint("paper", p, grid), torch.tensor(by_hand, dtype=torch.float64))


@every_law
def test_drawn_indices_follow_their_laws_and_never_coincide(pairs: str):
    N, B = 11, 400_000
    times = drawn(B, N, pairs)
    chances, grid = law_of_pairs(N, pairs)
    n, n_prime = torch.searchsorted(grid, times.t_n), torch.searchsorted(grid, times.t_prime)
    assert torch.equal(grid[n + 1], times.t_next)
    assert (n != n_prime).all()

    counts = torch.zeros_like(chances).index_put((n, n_prime), torch.ones(B, dtype=torch.float64), accumulate=True)
    spread = (B * chances * (1 - chances)).sqrt()
    assert ((counts - B * chances).abs() <= 5.5 * spread + 1e-9).all()


@every_law
def test_long_jumps_are_drawn_as_often_as_the_law_says(pairs: str):
    N, B = 1281, 1_000_000
    chances, grid = law_of_pairs(N, pairs)
    share = float(chances[long_jumps(grid[:-1, None], grid[None, : chances.shape[1]])].sum())
    times = drawn(B, N, pairs)
    found = int(long_jumps(times.t_n, times.t_prime).sum())
    assert abs(found - B * share) < 5 * math.sqrt(B * share)


@pytest.mark.parametrize("N", [81, 1281])
def test_how_often_one_step_inversion_is_trained(N: int):
    shares = {}
    for pairs in LAWS:
        chances, grid = law_of_pairs(N, pairs)
        shares[pairs] = float(chances[long_jumps(grid[:-1, None], grid[None, : chances.shape[1]])].sum())
    if N == 1281:
        # Computed independently for the paper's last stage.
        assert math.isclose(shares["paper"], 1.7e-4, rel_tol=0.05)
    for pairs in BEYOND:
        assert shares[pairs] > 15 * shares["paper"]


@pytest.mark.parametrize("pairs", BEYOND)
def test_beyond_the_paper_the_end_of_time_is_a_target(pairs: str):
    chances, grid = law_of_pairs(11, pairs)
    assert chances.shape == (10, 11) and (chances[:, -1] > 0).all()
    assert drawn(10_000, 11, pairs).t_prime.max() == grid[-1] == T_MAX


def test_the_paper_never_trains_the_end_of_time():
    chances, grid = law_of_pairs(11, "paper")
    assert chances.shape == (10, 10)
    assert drawn(10_000, 11, "paper").t_prime.max() <= grid[-2]


def test_weights_of_the_paper():
    times = draw_times(torch.rand(1000, 2, dtype=torch.float64), 41, PAPER)
    assert torch.allclose(times.weight_ct, 1 / (times.t_next - times.t_n), rtol=1e-12)
    assert torch.allclose(times.weight_st, 1 / (times.t_n - times.t_prime).abs(), rtol=1e-12)


def test_far_weights_pull_as_hard_as_the_log_distance_of_a_jump():
    # How far F_theta moves x_0 through f(x_t, t, u): |c_out(t, u)|, then the slope of the exact flow from u to 0.
    t = torch.tensor([0.07, 0.07, 80.0, 0.002, 6.0], dtype=torch.float64)
    u = torch.tensor([80.0, 6.0, 1.2, 0.02, 80.0], dtype=torch.float64)
    _, _, c_out = scalings(t, u)
    slope = 0.5 / torch.hypot(u, torch.tensor(0.5))
    distance = (torch.hypot(t, torch.tensor(0.5)) / torch.hypot(u, torch.tensor(0.5))).log().abs()
    pull = PAIR_LAWS["far"](t, u) * c_out.abs() * slope
    assert torch.allclose(pull, 0.2 * distance, rtol=1e-9, atol=0)


def test_wide_weights_by_hand():
    t = torch.tensor([0.01, 1.0, 1.0], dtype=torch.float64)
    u = torch.tensor([80.0, 0.5, 80.0], dtype=torch.float64)
    assert torch.allclose(PAIR_LAWS["wide"](t, u), torch.tensor([2.0, 0.2, 0.1], dtype=torch.float64))


@every_law
@pytest.mark.parametrize("N", [3, 11, 1281])
def test_weights_are_finite_and_positive_for_every_pair(N: int, pairs: str):
    chances, grid = law_of_pairs(N, pairs)
    n, n_prime = chances.nonzero(as_tuple=True)
    weights = PAIR_LAWS[pairs](grid[n], grid[n_prime])
    assert weights.dtype == torch.float64 and weights.isfinite().all() and (weights > 0).all()


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-53])
@every_law
def test_extreme_uniforms_stay_on_the_grid(extreme: float, pairs: str):
    config = ScheduleConfig(pairs=pairs)
    for N in (3, 11, 1281):
        for other in (0.0, 0.5, 1 - 2**-53):
            uniforms = torch.tensor([[extreme, other], [other, extreme]], dtype=torch.float64)
            times = draw_times(uniforms, N, config)
            assert (times.t_prime != times.t_n).all() and times.weight_st.isfinite().all()
