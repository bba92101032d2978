"""The layers of NCSN++ (Song et al., 2021): scaled initialisation, FIR resampling, residual blocks, attention."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from bcm.networks.unet import Block, ResidualBlock
from bcm.rng import Dropout
from bcm.types import Images

INV_SQRT2 = math.sqrt(0.5)
ZERO = 1e-10
"""The variance scale of layers that start at zero, near enough."""


def linear(inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
    """Make a dense layer with zero bias and Xavier-uniform weights, their variance multiplied by `scale`."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    nn.init.zeros_(layer.bias)
    return layer


def conv(inputs: int, outputs: int, kernel: int = 3, scale: float = 1.0) -> nn.Conv2d:
    """Make a convolution that keeps the image size, initialised as `linear`."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    """Make a GroupNorm of min(channels / 4, 32) groups, or of the next smaller number that divides the channels."""
    most = max(1, min(channels // 4, 32))
    groups = next(groups for groups in range(most, 0, -1) if channels % groups == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


def fir_filter() -> Tensor:
    """The smoothing filter [1, 3, 3, 1] in two dimensions, (1, 1, 4, 4), of sum 1."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return torch.outer(taps, taps)[None, None]


class FIR(nn.Module):
    """Halve the image size: smooth, then keep every second pixel; or double it; or smooth alone.

    In the precision of the filter also under autocast: CPUs are far slower at it in bf16.

    Args:
        upward: double the size: put zeros between the pixels, then smooth with four times the filter.
        stride: 1 keeps every pixel and makes one row and one column more, for a convolution that halves the size.
    """

    def __init__(self, *, upward: bool = False, stride: int = 2) -> None:
        """Make the filter."""
        super().__init__()
        self.convolve = functional.conv_transpose2d if upward else functional.conv2d
        self.stride = stride
        self.register_buffer("filter", (4 if upward else 1) * fir_filter(), persistent=False)
        self.filter: Tensor

    def forward(self, x: Images) -> Images:
        """Map (B, C, H, W) to (B, C, H/2, W/2), to (B, C, 2H, 2W), or to (B, C, H+1, W+1)."""
        taps = self.filter.expand(x.shape[1], -1, -1, -1)
        padding = 3 - self.stride
        with torch.autocast(x.device.type, enabled=False):
            y = self.convolve(x.to(taps.dtype), taps, stride=self.stride, padding=padding, groups=x.shape[1])
        return y.to(x.dtype)


class Pyramid(nn.Module):
    """The input pyramid, smaller and smaller copies of the input, mixed into the features.

    If residual: smooth, a 3x3 convolution at every second pixel, then the average with the features; the sum, divided
    by sqrt 2, is both the features and the next pyramid. Else halve the image; its 1x1 convolution is added to the
    features.
    """

    def __init__(self, inputs: int, outputs: int, *, residual: bool) -> None:
        """Make the filter and the convolution."""
        super().__init__()
        self.residual = residual
        self.smooth = FIR(stride=1 if residual else 2)
        self.conv = conv(inputs, outputs, kernel=3 if residual else 1)

    def forward(self, pyramid: Images, h: Images) -> tuple[Images, Images]:
        """Map the pyramid (B, inputs, H, W) and features (B, outputs, H/2, W/2) to the next pyramid and features."""
        smooth = self.smooth(pyramid)
        if not self.residual:
            return smooth, self.conv(smooth) + h
        h = (functional.conv2d(smooth, self.conv.weight, self.conv.bias, stride=2) + h).mul_(INV_SQRT2)
        return h, h


def residual_block(
    embedding: int, dropout: float, inputs: int, outputs: int, resample: nn.Module | None = None
) -> Block:
    """Make the BigGAN residual block, whose sum is divided by sqrt 2.

    Args:
        embedding: width of the time embedding.
        dropout: probability of dropping a value before the second convolution.
        inputs: channels in.
        outputs: channels out.
        resample: halves or doubles the image size on both branches.
    """
    return ResidualBlock(
        norm0=group_norm(inputs),
        conv0=conv(inputs, outputs),
        time=linear(embedding, outputs),
        norm1=group_norm(outputs),
        dropout=Dropout(dropout),
        conv1=conv(outputs, outputs, scale=ZERO),
        skip=nn.Identity() if inputs == outputs and resample is None else conv(inputs, outputs, kernel=1),
        resample=resample,
        scale=INV_SQRT2,
    )


class Attention(Block):
    """Self-attention of one head over all pixels, added to its input; the sum divided by sqrt 2."""

    def __init__(self, channels: int) -> None:
        """Make the layers."""
        super().__init__()
        self.norm = group_norm(channels)
        self.query = linear(channels, channels, scale=0.1)
        self.key = linear(channels, channels, scale=0.1)
        self.value = linear(channels, channels, scale=0.1)
        self.out = linear(channels, channels, scale=ZERO)

    def forward(self, x: Images) -> Images:
        """Map (B, C, H, W) to the same shape."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)[:, None]
        h = functional.scaled_dot_product_attention(self.query(pixels), self.key(pixels), self.value(pixels))
        h = self.out(h)[:, 0].transpose(1, 2).reshape(x.shape)
        return (x + h).mul_(INV_SQRT2)
