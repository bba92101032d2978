"""The digits as tensors, for benchmarks in one process."""

import numpy as np
import torch
from torch import Tensor

from data.prepare import digits


def uint8_images(split: str) -> tuple[Tensor, list[int]]:
    """The images (N, 1, 8, 8) and labels of "train" or "test"."""
    samples = list(digits.samples(split))
    return torch.from_numpy(np.stack([sample.image for sample in samples]))[:, None], [s.label for s in samples]
