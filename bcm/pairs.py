"""Laws of the second time of the soft-trajectory term: how n' is drawn, and the weight lambda' of a pair (Eq. 10)."""

from collections.abc import Callable

import torch
from torch import Tensor

from bcm.precond import SIGMA_DATA


def mass(law: str, p: Tensor, grid: Tensor) -> Tensor:
    """Unnormalised mass of n' by a law of `PAIR_LAWS`, before n' = n is excluded.

    It is p(n), (N-1,), for the paper's; for ours even over the whole `grid`, (N,).
    """
    return p if law == "paper" else torch.ones_like(grid)


def joint(law: str, p: Tensor, grid: Tensor) -> Tensor:
    """Probability of each pair (n, n') in training (Figure 14), row n and column n' from 1 on, float64; it sums to 1.

    Args:
        law: the law of n', a name in `PAIR_LAWS`.
        p: p(n), (N-1,).
        grid: t_1 ... t_N, (N,).

    Returns:
        (N-1, N-1), or (N-1, N) if the law can draw n' = N; the diagonal n' = n is 0.
    """
    q = mass(law, p, grid)
    chances = (q / q.sum()).repeat(len(p), 1)
    chances.fill_diagonal_(0)
    return p[:, None] * chances / chances.sum(1, keepdim=True)


def _paper_weight(t_n: Tensor, t_prime: Tensor) -> Tensor:
    return 1 / (t_n - t_prime).abs()


def _wide_weight(t_n: Tensor, t_prime: Tensor) -> Tensor:
    return 0.1 / torch.minimum((t_n - t_prime).abs(), t_n.clamp(min=0.05))


def _far_weight(t_n: Tensor, t_prime: Tensor) -> Tensor:
    """0.2 times the log of the change of scale, over how strongly F_theta in f(x_{t_n}, t_n, t_n') moves x_0.

    Data N(0, sigma_data^2 I) has scale sqrt(sigma_data^2 + t^2) at time t; for it the strength is the product of
    |c_out(t_n, t_n')| (Eq. 5) and of d x_0 / d x_{t_n'}, the quotient of the scales at 0 and t_n'.
    """
    scale_n, scale_prime = (SIGMA_DATA**2 + t_n**2).sqrt(), (SIGMA_DATA**2 + t_prime**2).sqrt()
    strength = SIGMA_DATA * (t_n - t_prime).abs() / scale_n * SIGMA_DATA / scale_prime
    return 0.2 * (scale_n / scale_prime).log().abs() / strength


PAIR_LAWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "paper": _paper_weight,
    "wide": _wide_weight,
    "far": _far_weight,
}
"""The laws of n' by name, each with its weight lambda'(t_n, t_n'), (B,) from (B,), (B,); `mass` says how n' is drawn.
`paper`: n' ~ p(n), lambda' = 1/|t_n - t_n'| (Section 3.2). Ours draw n' evenly from the grid, its end T included, so
that long jumps are trained too (docs/log.md): `wide` with a mild weight that favours jumps up from small times, `far`
with one that makes the gradient of each pair grow with the distance it travels in log scale, up or down."""
