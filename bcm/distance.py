"""The distance between images (Eq. 12)."""

from torch import Tensor

from bcm.types import Images

HUBER_SCALE = 0.00054
"""c of Eq. 12 is this times the square root of the data dimension."""
OFFICIAL_C = 0.06
"""c of the official code at every data dimension."""


def pseudo_huber(x: Images, y: Images, c: float | None = None) -> Tensor:
    """d(x, y) = sqrt(||x - y||^2 + c^2) - c, (B,) float32 or wider; by default c = 0.00054 sqrt(D) (Eq. 12)."""
    difference = (x - y).flatten(1)
    difference = difference if difference.dtype.itemsize >= 4 else difference.float()
    scale = HUBER_SCALE * difference.shape[1] ** 0.5 if c is None else c
    return (difference.square().sum(1) + scale**2).sqrt() - scale


def official_huber(x: Images, y: Images) -> Tensor:
    """The official code's variant, (B,): c = 0.06, and the distance is divided by sqrt(D)."""
    return pseudo_huber(x, y, OFFICIAL_C) / x[0].numel() ** 0.5
