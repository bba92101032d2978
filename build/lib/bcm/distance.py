"""The distance between images (Eq. 12)."""

from torch import Tensor

from bcm.types import Images

HUBER_SCALE = 0.00054
"""c of Eq. 12 is this times the square root of the data dimension."""


def pseudo_huber(x: Images, y: Images) -> Tensor:
    """d(x, y) = sqrt(||x - y||^2 + c^2) - c with c = 0.00054 sqrt(D), (B,) float32 or wider (Eq. 12)."""
    difference = (x - y).flatten(1)
    difference = difference if difference.dtype.itemsize >= 4 else difference.float()
    c = HUBER_SCALE * difference.shape[1] ** 0.5
    return (difference.square().sum(1) + c**2).sqrt() - c
