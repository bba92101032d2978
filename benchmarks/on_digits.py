"""Training batches of the digits for benchmarks in one process."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bcm.training import TrainConfig
from data.order import batch_ids
from data.sources import digits


@dataclass(frozen=True)
class Batch:
    positions: Tensor
    images: Tensor
    labels: Tensor


def uint8_images(split: str) -> tuple[Tensor, list[int]]:
    samples = list(digits.samples(split))
    return torch.from_numpy(np.stack([sample.image for sample in samples]))[:, None], [s.label for s in samples]


def batches(train: Tensor, config: TrainConfig) -> Iterator[Batch]:
    seen, size = 0, config.batch_size
    while True:
        _, ids = batch_ids(config.seed, seen, size, len(train))
        yield Batch(torch.arange(seen, seen + size), train[ids], torch.zeros(size, dtype=torch.int64))
        seen += size
