"""The vocabulary of the package: shapes, the flow protocol, and the one helper that broadcasts times."""

from typing import Protocol

import torch
from torch import Tensor

Images = Tensor
"""(B, C, H, W), float, data scaled to [-1, 1]; at time t the noise has standard deviation t."""
Times = Tensor
"""(B,), float, positive: the time (noise level) of each image, in [t_min, t_max]."""
Labels = Tensor
"""(B,), int64, in [0, classes)."""


class BCMError(ValueError):
    """A wrong value given by the user; the message names the thing, what is wrong and the remedy."""


class Flow(Protocol):
    """The map f(x_t, t, u) -> x_u along the probability-flow ODE (paper, Section 3.1)."""

    def __call__(self, x_t: Images, t: Times, u: Times, label: Labels | None = None) -> Images:
        """Carry `x_t` (B, C, H, W) from times `t` (B,) to times `u` (B,)."""
        ...


def like_images(times: Times, x: Images) -> Tensor:
    """Reshape times (B,) to (B, 1, 1, 1) in the dtype of the images `x`, ready to multiply them."""
    return times.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def at_time(time: float, x: Images) -> Times:
    """One time for a whole batch: (B,) float64 filled with `time` on the device of `x`."""
    return torch.full((x.shape[0],), time, dtype=torch.float64, device=x.device)


def from_uint8(images: Tensor) -> Images:
    """Scale uint8 images (B, C, H, W) in [0, 255] to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Images) -> Tensor:
    """Clamp to [-1, 1] and round to uint8 in [0, 255]."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
