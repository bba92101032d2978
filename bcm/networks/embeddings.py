"""Times and labels as vectors."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from bcm.networks.unet import UNetConfig
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


def positional(times: Times, size: int) -> Tensor:
    """Positional features of c = 250 ln(t): cat(cos, sin)(w c), with w falling geometrically from 1 to 1 / 10,000.

    Maps (B,) to (B, `size`) float32, `size` being even; the logarithm keeps the dtype of `times`.
    """
    half = size // 2
    powers = torch.arange(half, dtype=torch.float64, device=times.device) / half
    # c reaches 1,500: rounded elsewhere, its cosine would leave that of published weights in the fourth digit.
    c = 250 * times.log().float()
    angles = c[:, None] * torch.exp(-math.log(10_000) * powers).float()
    return torch.cat((angles.cos(), angles.sin()), dim=1)


class TimeEmbedding(nn.Module):
    """The vector every residual block reads: features of the times through two dense layers, plus the label's.

    Two joint times are concatenated and double the widths (Section 3.1). Two projected times have two dense layers
    each; a matrix that starts as [I, 0] reduces the two vectors to one, so that u is ignored at first and the rest may
    come from a network of one time (Section 3.2, Appendix C.1).

    Args:
        features: makes the features of one time.
        inputs: how many they are.
        dense: makes a dense layer of so many inputs and outputs.
        config: of the network; the vector for one time has four times its width.
        form: of two times, joint or projected.
    """

    def __init__(
        self,
        features: Callable[[Times], Tensor],
        inputs: int,
        dense: Callable[[int, int], nn.Linear],
        config: UNetConfig,
        form: str,
    ) -> None:
        """Make the layers."""
        super().__init__()
        projected = config.times == 2 and form == "projected"
        self.times = config.times
        self.joint = config.times == 2 and form == "joint"
        self.size = 4 * config.width * (2 if self.joint else 1)
        self.features = features
        self.dense0 = dense(inputs * (2 if self.joint else 1), self.size)
        self.dense1 = dense(self.size, self.size)
        self.end0 = dense(inputs, self.size) if projected else None
        self.end1 = dense(self.size, self.size) if projected else None
        self.project = nn.Linear(2 * self.size, self.size, bias=False) if projected else None
        if self.project is not None:
            nn.init.eye_(self.project.weight)  # [I, 0]
        self.label = nn.Embedding(config.classes, self.size) if config.classes else None

    def forward(self, t: Times, u: Times, label: Labels | None) -> Tensor:
        """Embed times (B,) and labels (B,) as (B, size), activated."""
        dtype = self.dense0.weight.dtype
        start, *end = [self.features(times).to(dtype) for times in (t, u)[: self.times]]
        h = self.dense1(functional.silu(self.dense0(torch.cat((start, *end), dim=1) if self.joint else start)))
        if self.end0 is not None and self.end1 is not None and self.project is not None:
            h = self.project(torch.cat((h, self.end1(functional.silu(self.end0(*end)))), dim=1))
        if self.label is None:
            if label is not None:
                raise BCMError(
                    "labels are given to an unconditional network; leave them out, or build it with classes > 0"
                )
            return functional.silu(h)
        classes = self.label.num_embeddings
        if label is None:
            raise BCMError(
                f"the network has {classes} classes and needs a label for each image; give label, (B,) int64"
            )
        # On the CPU alone: a look at the values would stall a GPU.
        if label.device.type == "cpu" and label.numel() and not 0 <= int(label.min()) <= int(label.max()) < classes:
            raise BCMError(f"labels span {int(label.min())} to {int(label.max())}; they must lie in [0, {classes})")
        return functional.silu(h + self.label(label))
