"""Training batches for benchmarks in one process."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bcm.training import TrainConfig
from data.order import batch_ids


@dataclass(frozen=True)
class Batch:
    positions: Tensor
    images: Tensor
    labels: Tensor


def batches(train: Tensor, config: TrainConfig) -> Iterator[Batch]:
    """Batches of uint8 images (N, C, H, W) in the order of training, without end; the labels are zeros."""
    seen, size = 0, config.batch_size
    while True:
        _, ids = batch_ids(config.seed, seen, size, len(train))
        yield Batch(torch.arange(seen, seen + size), train[ids], torch.zeros(size, dtype=torch.int64))
        seen += size
