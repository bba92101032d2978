"""Metrics that merge across batches and workers: moments, Frechet distance, reconstruction error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bcm.types import BCMError, Images

eigh: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.linalg.eigh  # pyright: ignore
eigvalsh: Callable[[Tensor], Tensor] = torch.linalg.eigvalsh  # pyright: ignore


@dataclass(frozen=True)
class Moments:
    """Sums of feature vectors in float64; adding two merges them."""

    count: int
    total: Tensor
    """Sum of the features, (D,)."""
    outer: Tensor
    """Sum of their outer products, (D, D)."""

    @staticmethod
    def of(features: Tensor) -> Moments:
        """Moments of features (B, ...), flattened to (B, D)."""
        rows = features.flatten(1).to(torch.float64)
        return Moments(rows.shape[0], rows.sum(0), rows.T @ rows)

    def __add__(self, other: Moments) -> Moments:
        """Merge two disjoint sets of samples."""
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        """(D,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (D, D); needs two samples."""
        if self.count < 2:
            raise BCMError(f"a covariance needs at least 2 samples, not {self.count}.")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """||m_a - m_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the distance behind FID (Heusel et al. 2017).

    The trace of the square root is taken from the symmetric sqrt(S_a) S_b sqrt(S_a), which has the same eigenvalues.
    """
    S_a, S_b = a.covariance, b.covariance
    values, vectors = eigh(S_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = eigvalsh(root @ S_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + S_a.trace() + S_b.trace() - 2 * cross
    return float(distance)


def mse(x: Images, y: Images) -> Tensor:
    """Mean squared error of each image, (B,) float64, with pixels scaled to [0, 1] (Section 4.2).

    Inputs are in [-1, 1]; both are clamped to it first, so that only what can be seen is measured.
    """
    difference = (x.clamp(-1, 1) - y.clamp(-1, 1)).flatten(1).to(torch.float64)
    return difference.square().mean(1) / 4
