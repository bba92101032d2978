"""NCSN++ (Song et al., 2021) as in improved consistency training, with one time or two."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bcm.networks.embeddings import TimeEmbedding
from bcm.networks.layers import (
    INV_SQRT2,
    ZERO,
    Attention,
    FIRDown,
    FIRUp,
    PyramidDown,
    ResidualBlock,
    conv,
    group_norm,
)
from bcm.types import BCMError, Images, Labels, Times


@dataclass(frozen=True, kw_only=True)
class NCSNppConfig:
    """The shape of an NCSN++; the defaults are the CIFAR-10 network (61.9M parameters)."""

    image_channels: int = 3
    """Channels of the images."""
    resolution: int = 32
    """Height and width of the images; halved between levels."""
    width: int = 128
    """Channels of the first level before its multiplier, a multiple of 4; also the number of Fourier frequencies."""
    channel_mult: tuple[int, ...] = (2, 2, 2)
    """Channels of each level over `width`, from the full resolution down."""
    blocks: int = 4
    """Residual blocks of each encoder level (8 in the deep network); decoder levels have one more."""
    attention: tuple[int, ...] = (16,)
    """Resolutions of the levels with attention; the middle always has it."""
    dropout: float = 0.3
    """Probability of dropping a value inside a residual block, in [0, 1)."""
    fourier_scale: float = 0.02
    """Standard deviation of the Fourier frequencies, positive (16 in score-based models)."""
    times: int = 2
    """1 reads t alone (a consistency model), 2 reads t and u (a bidirectional one)."""
    classes: int = 0
    """Number of class labels, 0 for an unconditional network."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("image_channels", "resolution", "width", "blocks"):
            if getattr(self, name) < 1:
                raise BCMError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.width % 4:
            raise BCMError(f"width is {self.width}; group normalisation needs a multiple of 4")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise BCMError(f"channel_mult is {self.channel_mult}; give one positive integer for each level")
        if self.resolution % 2 ** (len(self.channel_mult) - 1):
            raise BCMError(
                f"resolution {self.resolution} cannot be halved {len(self.channel_mult) - 1} times, "
                f"once between two of the {len(self.channel_mult)} levels of channel_mult; shorten channel_mult"
            )
        if unknown := set(self.attention) - set(self.resolutions):
            raise BCMError(f"attention at {sorted(unknown)} is asked for, but the levels are {self.resolutions}")
        if not 0 <= self.dropout < 1:
            raise BCMError(f"dropout is {self.dropout}; it must lie in [0, 1)")
        if not 0 < self.fourier_scale < math.inf:
            raise BCMError(f"fourier_scale is {self.fourier_scale}; it must be positive and finite")
        if self.times not in (1, 2):
            raise BCMError(f"times is {self.times}; it must be 1 (t alone) or 2 (t and u)")
        if self.classes < 0:
            raise BCMError(f"classes is {self.classes}; it must be 0 (unconditional) or the number of labels")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The image size of each level."""
        return tuple(self.resolution >> level for level in range(len(self.channel_mult)))

    @property
    def channels(self) -> tuple[int, ...]:
        """The channels of each level."""
        return tuple(self.width * mult for mult in self.channel_mult)


class NCSNpp(nn.Module):
    """F_theta(c_in x_t, t, u), the raw network inside the preconditioning.

    The encoder runs over the levels from the full resolution down, the decoder back up. Between encoder levels the
    features are averaged with the input pyramid, an image that is smoothed, halved and convolved from level to level.
    Every encoder output is concatenated to one decoder block's input. An untrained network's output is nearly zero.
    """

    def __init__(self, config: NCSNppConfig) -> None:
        """Build the network of `config` with weights drawn from torch's global generator."""
        super().__init__()
        self.config = config
        self.embedding = TimeEmbedding(config.width, config.times, config.fourier_scale, config.classes)
        self.first = conv(config.image_channels, config.width)
        skips = [config.width]
        inputs, pyramid = config.width, config.image_channels
        self.encoder = nn.ModuleList()
        for level, outputs in enumerate(config.channels):
            self.encoder.append(EncoderLevel(config, level, inputs, outputs, pyramid, self.embedding.size))
            skips += [inputs] * (level > 0) + [outputs] * config.blocks
            pyramid = inputs if level else pyramid
            inputs = outputs
        self.middle = Middle(inputs, self.embedding.size, config.dropout)
        self.decoder = nn.ModuleList()
        for level, outputs in reversed(list(enumerate(config.channels))):
            level_skips = [skips.pop() for _ in range(config.blocks + 1)]
            self.decoder.append(DecoderLevel(config, level, inputs, outputs, level_skips, self.embedding.size))
            inputs = outputs
        self.last_norm = group_norm(inputs)
        self.last = conv(inputs, config.image_channels, scale=ZERO)

    def forward(self, x: Images, t: Times, u: Times, label: Labels | None = None) -> Images:
        """Compute F.

        Args:
            x: (B, C, H, W), the noisy images times c_in.
            t: (B,), positive, their times, in any floating dtype.
            u: (B,), positive, the times to go to; ignored by a network of one time.
            label: (B,) int64 in [0, classes), needed if and only if the network has classes.

        Returns:
            (B, C, H, W).

        Raises:
            BCMError: images or times of another shape; labels missing, unwanted or (seen on the CPU only) out of range.
        """
        self._check_shapes(x, t, u)
        embedding = self.embedding(t, u, label)
        h, pyramid = self.first(x), x
        skips = [h]
        for level in self.encoder:
            h, pyramid = level(h, pyramid, skips, embedding)
        h = self.middle(h, embedding)
        for level in self.decoder:
            h = level(h, skips, embedding)
        return self.last(functional.silu(self.last_norm(h)))

    def _check_shapes(self, x: Images, t: Times, u: Times) -> None:
        size = (self.config.image_channels, self.config.resolution, self.config.resolution)
        if x.shape[1:] != size:
            raise BCMError(f"the network was built for images of {size}, but these are {tuple(x.shape[1:])}")
        for name, times in (("t", t), ("u", u))[: self.config.times]:
            if times.shape != x.shape[:1]:
                raise BCMError(f"{name} has shape {tuple(times.shape)}; give one time for each of {len(x)} images")


class EncoderLevel(nn.Module):
    """Halve the image (but for the first level), mix in the input pyramid, then run the residual blocks."""

    def __init__(
        self, config: NCSNppConfig, level: int, inputs: int, outputs: int, pyramid: int, embedding: int
    ) -> None:
        """Make the layers of `level`."""
        super().__init__()
        self.down = ResidualBlock(inputs, inputs, embedding, config.dropout, FIRDown()) if level else None
        self.pyramid_down = PyramidDown(pyramid, inputs) if level else None
        widths = [inputs] + [outputs] * config.blocks
        attend = config.resolutions[level] in config.attention
        self.blocks = nn.ModuleList(
            ResidualBlock(widths[index], outputs, embedding, config.dropout) for index in range(config.blocks)
        )
        self.attention = nn.ModuleList(Attention(outputs) if attend else nn.Identity() for _ in range(config.blocks))

    def forward(self, h: Images, pyramid: Images, skips: list[Tensor], embedding: Tensor) -> tuple[Images, Images]:
        """Return the features and the pyramid; each of the level's outputs is appended to `skips`."""
        if self.down is not None and self.pyramid_down is not None:
            h = pyramid = (self.pyramid_down(pyramid) + self.down(h, embedding)).mul_(INV_SQRT2)
            skips.append(h)
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h = attention(block(h, embedding))
            skips.append(h)
        return h, pyramid


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, embedding: int, dropout: float) -> None:
        """Make the layers."""
        super().__init__()
        self.block0 = ResidualBlock(channels, channels, embedding, dropout)
        self.attention = Attention(channels)
        self.block1 = ResidualBlock(channels, channels, embedding, dropout)

    def forward(self, h: Images, embedding: Tensor) -> Images:
        """Map the features to features of the same shape."""
        return self.block1(self.attention(self.block0(h, embedding)), embedding)


class DecoderLevel(nn.Module):
    """Double the image (but for the lowest level), run the residual blocks on features and skips, then attention."""

    def __init__(
        self, config: NCSNppConfig, level: int, inputs: int, outputs: int, skips: list[int], embedding: int
    ) -> None:
        """Make the layers of `level`; `skips` are the channels of the encoder outputs it reads."""
        super().__init__()
        lowest = level == len(config.channels) - 1
        self.up = None if lowest else ResidualBlock(inputs, inputs, embedding, config.dropout, FIRUp())
        widths = [inputs] + [outputs] * config.blocks
        self.blocks = nn.ModuleList(
            ResidualBlock(width + skip, outputs, embedding, config.dropout)
            for width, skip in zip(widths, skips, strict=True)
        )
        attend = config.resolutions[level] in config.attention
        self.attention = Attention(outputs) if attend else nn.Identity()

    def forward(self, h: Images, skips: list[Tensor], embedding: Tensor) -> Images:
        """Return the features of the level; one of `skips` is popped for each block."""
        if self.up is not None:
            h = self.up(h, embedding)
        for block in self.blocks:
            h = block(torch.cat((h, skips.pop()), dim=1), embedding)
        return self.attention(h)
