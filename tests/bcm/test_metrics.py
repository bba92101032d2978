import pytest
import torch

from bcm.metrics import Moments, frechet_distance, mse
from bcm.types import BCMError

G = torch.Generator().manual_seed(0)
A = torch.randn(500, 6, dtype=torch.float64, generator=G) @ torch.randn(6, 6, dtype=torch.float64, generator=G)


def test_moments_merge_to_those_of_the_whole():
    parts = Moments.of(A[:7]) + Moments.of(A[7:300]) + Moments.of(A[300:])
    assert parts.count == 500
    assert torch.allclose(parts.mean, A.mean(0), rtol=1e-12)
    assert torch.allclose(parts.covariance, torch.cov(A.T), rtol=1e-9)


def test_distance_to_itself_is_zero_and_a_shift_costs_its_square():
    a = Moments.of(A)
    assert abs(frechet_distance(a, a)) < 1e-8
    shift = torch.tensor([3.0, 0, 0, 4.0, 0, 0], dtype=torch.float64)
    assert frechet_distance(a, Moments.of(A + shift)) == pytest.approx(25, rel=1e-9)


def test_distance_of_diagonal_gaussians_is_known():
    def with_deviation(s: torch.Tensor) -> Moments:
        n, d = 100, s.numel()
        return Moments(n, torch.zeros(d, dtype=torch.float64), (n - 1) * torch.diag(s**2))

    a, b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([2.0, 2.0, 3.0]).double()
    expected = float(((a - b) ** 2).sum())
    assert frechet_distance(with_deviation(a), with_deviation(b)) == pytest.approx(expected, rel=1e-9)


def test_distance_is_symmetric_and_agrees_with_the_eigenvalues_of_the_product():
    a, b = Moments.of(A[:200]), Moments.of(2 * A[200:] + 1)
    product = torch.linalg.eigvals(a.covariance @ b.covariance).sqrt().real.sum()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * product
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_rank_deficient_covariances_are_fine():
    assert abs(frechet_distance(Moments.of(A[:3]), Moments.of(A[:3]))) < 1e-5


def test_covariance_of_one_sample_is_refused():
    with pytest.raises(BCMError, match="at least 2"):
        _ = Moments.of(A[:1]).covariance


def test_mse_is_in_the_unit_range_and_clamps():
    x = torch.zeros(2, 1, 4, 4)
    y = torch.stack([torch.full((1, 4, 4), 0.5), torch.full((1, 4, 4), 7.0)])
    assert mse(x, y).tolist() == pytest.approx([0.25 / 4, 1 / 4])
