"""Training batches for benchmarks in one process."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bcm.training import TrainConfig
from data.order import Shuffle, batch_ids


@dataclass(frozen=True)
class Batch:
    positions: Tensor
    images: Tensor
    labels: Tensor


def batches(train: Tensor, config: TrainConfig) -> Iterator[Batch]:
    """Batches of uint8 images (N, C, H, W) in the order of training, without end; the labels are zeros."""
    seen, size, shuffle = 0, config.batch_size, Shuffle(counts=(len(train),))
    while True:
        _, ids = batch_ids(config.seed, seen, size, shuffle)
        yield Batch(torch.arange(seen, seen + size), train[ids], torch.zeros(size, dtype=torch.int64))
        seen += size
