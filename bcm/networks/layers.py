"""The layers of NCSN++ (Song et al., 2021): scaled initialisation, FIR resampling, residual blocks, attention."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from bcm.networks.unet import Block
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


def smoothed(x: Images, taps: Tensor, *, stride: int, padding: int, upward: bool = False) -> Images:
    """Convolve each channel of `x` with the (1, 1, 4, 4) `taps`; `upward` puts zeros between the pixels before.

    In the precision of `taps` also under autocast: CPUs are far slower at it in bf16.
    """
    convolve = functional.conv_transpose2d if upward else functional.conv2d
    weight = taps.expand(x.shape[1], -1, -1, -1)
    with torch.autocast(x.device.type, enabled=False):
        y = convolve(x.to(taps.dtype), weight, stride=stride, padding=padding, groups=x.shape[1])
    return y.to(x.dtype)


class FIR(nn.Module):
    """Halve the image size: smooth, then keep every second pixel; or double it.

    Args:
        upward: double the size: put zeros between the pixels, then smooth with four times the filter.
    """

    def __init__(self, *, upward: bool = False) -> None:
        """Make the filter."""
        super().__init__()
        self.upward = upward
        self.register_buffer("filter", (4 if upward else 1) * fir_filter(), persistent=False)
        self.filter: Tensor

    def forward(self, x: Images) -> Images:
        """Map (B, C, H, W) to (B, C, H/2, W/2), or to (B, C, 2H, 2W)."""
        return smoothed(x, self.filter, stride=2, padding=1, upward=self.upward)


class PyramidDown(nn.Module):
    """The residual input pyramid: smooth, a 3x3 convolution at every second pixel, then the average with the features.

    The sum is divided by sqrt 2; it is both the features and the next pyramid.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        """Make the filter and the convolution."""
        super().__init__()
        self.register_buffer("filter", fir_filter(), persistent=False)
        self.filter: Tensor
        self.conv = conv(inputs, outputs)

    def forward(self, pyramid: Images, h: Images) -> tuple[Images, Images]:
        """Map the pyramid (B, inputs, H, W) and features (B, outputs, H/2, W/2) to the next pyramid and features."""
        smooth = smoothed(pyramid, self.filter, stride=1, padding=2)
        h = (functional.conv2d(smooth, self.conv.weight, self.conv.bias, stride=2) + h).mul_(INV_SQRT2)
        return h, h


class PyramidSkip(nn.Module):
    """The skipping input pyramid: halve the image; its 1x1 convolution is added to the features."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Make the filter and the convolution."""
        super().__init__()
        self.down = FIR()
        self.conv = conv(inputs, outputs, kernel=1)

    def forward(self, pyramid: Images, h: Images) -> tuple[Images, Images]:
        """Map the pyramid (B, inputs, H, W) and features (B, outputs, H/2, W/2) to the next pyramid and features."""
        pyramid = self.down(pyramid)
        return pyramid, self.conv(pyramid) + h


class ToImage(nn.Module):
    """Norm, SiLU and a 3x3 convolution that starts at zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Make the layers."""
        super().__init__()
        self.norm = group_norm(inputs)
        self.conv = conv(inputs, outputs, scale=ZERO)

    def forward(self, h: Images) -> Images:
        """Map features (B, inputs, H, W) to images (B, outputs, H, W)."""
        return self.conv(functional.silu(self.norm(h)))


class ResidualBlock(Block):
    """The BigGAN residual block: norm, SiLU, resample, conv, + time, norm, SiLU, dropout, conv; the sum over sqrt 2.

    Args:
        inputs: channels in.
        outputs: channels out.
        embedding: width of the time embedding.
        dropout: probability of dropping a value before the second convolution.
        resample: halves or doubles the image size on both branches.
    """

    def __init__(
        self, inputs: int, outputs: int, embedding: int, dropout: float, resample: nn.Module | None = None
    ) -> None:
        """Make the layers."""
        super().__init__()
        self.resample = nn.Identity() if resample is None else resample
        self.norm0 = group_norm(inputs)
        self.conv0 = conv(inputs, outputs)
        self.time = linear(embedding, outputs)
        self.norm1 = group_norm(outputs)
        self.dropout = Dropout(dropout)
        self.conv1 = conv(outputs, outputs, scale=ZERO)
        plain = inputs == outputs and resample is None
        self.skip = nn.Identity() if plain else conv(inputs, outputs, kernel=1)

    def forward(self, x: Images, embedding: Tensor) -> Images:
        """Map (B, inputs, H, W) and the activated time embedding (B, width) to (B, outputs, H', W')."""
        h = self.conv0(self.resample(functional.silu(self.norm0(x))))
        h = h + self.time(embedding)[:, :, None, None]
        h = self.conv1(self.dropout(functional.silu(self.norm1(h))))
        return (self.skip(self.resample(x)) + h).mul_(INV_SQRT2)


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
