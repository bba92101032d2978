"""Feature spaces in which images are compared; today the pixels."""

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d

from bcm.types import Images, from_uint8

FEATURES = 3072
"""Most features of the pixel Frechet distance, those of a CIFAR-10 image; larger images are averaged down to fit."""
PIXELS = f"pixels-{FEATURES}"
"""Name of the extractor `pixels`, which stands in every score that it made."""


def as_images(images: NDArray) -> Images:
    """uint8 images (B, C, H, W) as floats in [-1, 1]."""
    return from_uint8(torch.tensor(images))


def pixels(x: Images) -> Tensor:
    """Pixels in [0, 1], clamped, flattened to (B, D): the features of the pixel Frechet distance.

    Images of more than `FEATURES` values are halved, by averages of 2x2 pixels, until they fit.
    """
    x = (x.clamp(-1, 1) + 1) / 2
    while x[0].numel() > FEATURES:
        x = avg_pool2d(x, 2)
    return x.flatten(1)
