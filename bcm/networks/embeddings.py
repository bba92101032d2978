"""Times and labels as vectors."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from bcm.networks.layers import linear
from bcm.types import BCMError, Labels, Times


class Fourier(nn.Module):
    """Random Fourier features of c = ln(t) / 4: cat(sin, cos)(2 pi w c), with w ~ N(0, scale^2) drawn once and saved.

    Args:
        frequencies: how many w.
        scale: standard deviation of w; 0.02 keeps consistency training stable (Song and Dhariwal, 2024).
    """

    def __init__(self, frequencies: int, scale: float) -> None:
        """Draw the frequencies."""
        super().__init__()
        self.register_buffer("frequencies", torch.randn(frequencies) * scale)
        self.frequencies: Tensor

    def forward(self, times: Times) -> Tensor:
        """Map (B,) to (B, 2 frequencies) in the dtype of the frequencies; the logarithm keeps that of `times`."""
        c = (times.log() / 4).to(self.frequencies.dtype)
        angles = c[:, None] * (2 * math.pi * self.frequencies)
        return torch.cat((angles.sin(), angles.cos()), dim=1)


class TimeEmbedding(nn.Module):
    """The vector every residual block reads: features of t, or of t and u, through two dense layers, plus the label's.

    Two times are concatenated and double the widths (Section 3.1).

    Args:
        width: frequencies of each time.
        times: 1 embeds t, 2 embeds t and u.
        scale: standard deviation of the frequencies, which t and u share.
        classes: number of labels, 0 for none.
    """

    def __init__(self, width: int, times: int, scale: float, classes: int) -> None:
        """Make the layers."""
        super().__init__()
        self.times = times
        self.size = 4 * width * times
        self.fourier = Fourier(width, scale)
        self.dense0 = linear(2 * width * times, self.size)
        self.dense1 = linear(self.size, self.size)
        self.label = nn.Embedding(classes, self.size) if classes else None

    def forward(self, t: Times, u: Times, label: Labels | None) -> Tensor:
        """Embed times (B,) and labels (B,) as (B, size), activated."""
        features = self.fourier(t) if self.times == 1 else torch.cat((self.fourier(t), self.fourier(u)), dim=1)
        h = self.dense1(functional.silu(self.dense0(features)))
        if self.label is not None:
            h = h + self.label(_checked(label, self.label.num_embeddings))
        elif label is not None:
            raise BCMError("labels are given to an unconditional network; leave them out, or build it with classes > 0")
        return functional.silu(h)


def _checked(label: Labels | None, classes: int) -> Labels:
    """Refuse missing labels, and on the CPU (a check would stall a GPU) labels that are no class."""
    if label is None:
        raise BCMError(f"the network has {classes} classes and needs a label for each image; give label, (B,) int64")
    if label.device.type == "cpu" and label.numel() and not 0 <= int(label.min()) <= int(label.max()) < classes:
        raise BCMError(f"labels span {int(label.min())} to {int(label.max())}; they must lie in [0, {classes})")
    return label
