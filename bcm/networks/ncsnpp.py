"""NCSN++ (Song et al., 2021) as in improved consistency training, with one time or two."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bcm.networks.embeddings import Fourier, TimeEmbedding
from bcm.networks.layers import (
    FIR,
    Attention,
    PyramidDown,
    PyramidSkip,
    ResidualBlock,
    ToImage,
    conv,
    linear,
)
from bcm.networks.unet import Middle, UNet, UNetConfig
from bcm.types import BCMError, Images, Labels, Times


@dataclass(frozen=True, kw_only=True)
class NCSNppConfig(UNetConfig):
    """The shape of an NCSN++; the defaults are the CIFAR-10 network (61.9M parameters)."""

    kind: Literal["ncsnpp"] = "ncsnpp"
    """Tells the networks apart in JSON."""
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
    progressive: str = "none"
    """How the output is made: none, by the last level; output_skip, as a sum of images over all decoder levels."""
    progressive_input: str = "residual"
    """How smaller copies of the input enter the encoder: residual, convolved and averaged with the features;
    input_skip, by a 1x1 convolution that is added to them."""
    embedding: str = "joint"
    """How two times are embedded: joint, concatenated Fourier features and doubled widths (Section 3.1); projected, one
    untied embedding each and a projection of both (Section 3.2, to fine-tune from a network of one time)."""

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        if self.width % 4:
            raise BCMError(f"width is {self.width}; group normalisation needs a multiple of 4")
        if not 0 < self.fourier_scale < math.inf:
            raise BCMError(f"fourier_scale is {self.fourier_scale}; it must be positive and finite")
        self.check_choice("progressive", ("none", "output_skip"))
        self.check_choice("progressive_input", ("residual", "input_skip"))
        self.check_choice("embedding", ("joint", "projected"))


class NCSNpp(UNet):
    """F_theta(c_in x_t, t, u), the raw network inside the preconditioning.

    The encoder runs over the levels from the full resolution down, the decoder back up. Smaller and smaller copies of
    the input, the input pyramid, are mixed into the features between encoder levels. Every encoder output is
    concatenated to one decoder block's input. An untrained network's output is nearly zero.
    """

    def __init__(self, config: NCSNppConfig) -> None:
        """Build the network of `config` with weights drawn from torch's global generator."""
        super().__init__()
        self.config = config
        self.embedding = TimeEmbedding(
            Fourier(config.width, config.fourier_scale),
            linear,
            width=config.width,
            times=config.times,
            form=config.embedding,
            classes=config.classes,
        )
        self.first = conv(config.image_channels, config.width)
        skips = [config.width]
        inputs, pyramid = config.width, config.image_channels
        self.encoder = nn.ModuleList()
        for level, outputs in enumerate(config.channels):
            self.encoder.append(EncoderLevel(config, level, inputs, outputs, pyramid, self.embedding.size))
            skips += [inputs] * (level > 0) + [outputs] * config.blocks
            if level and config.progressive_input == "residual":
                pyramid = inputs
            inputs = outputs
        self.middle = Middle(
            ResidualBlock(inputs, inputs, self.embedding.size, config.dropout),
            Attention(inputs),
            ResidualBlock(inputs, inputs, self.embedding.size, config.dropout),
        )
        self.decoder = nn.ModuleList()
        for level, outputs in reversed(list(enumerate(config.channels))):
            level_skips = [skips.pop() for _ in range(config.blocks + 1)]
            self.decoder.append(DecoderLevel(config, level, inputs, outputs, level_skips, self.embedding.size))
            inputs = outputs

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
        self.config.check_inputs(x, t, u)
        embedding = self.embedding(t, u, label)
        h, pyramid, image = self.first(x), x, None
        skips = [h]
        for level in self.encoder:
            h, pyramid = level(h, pyramid, skips, embedding)
        h = self.middle(h, embedding)
        for level in self.decoder:
            h, image = level(h, image, skips, embedding)
        assert image is not None
        return image


class EncoderLevel(nn.Module):
    """Halve the image (but for the first level), mix in the input pyramid, then run the residual blocks."""

    def __init__(
        self, config: NCSNppConfig, level: int, inputs: int, outputs: int, pyramid: int, embedding: int
    ) -> None:
        """Make the layers of `level`."""
        super().__init__()
        mix = PyramidDown if config.progressive_input == "residual" else PyramidSkip
        self.down = ResidualBlock(inputs, inputs, embedding, config.dropout, FIR()) if level else None
        self.pyramid = mix(pyramid, inputs) if level else None
        widths = [inputs] + [outputs] * config.blocks
        attend = config.resolutions[level] in config.attention
        self.blocks = nn.ModuleList(
            ResidualBlock(widths[index], outputs, embedding, config.dropout) for index in range(config.blocks)
        )
        self.attention = nn.ModuleList(Attention(outputs) if attend else nn.Identity() for _ in range(config.blocks))

    def forward(self, h: Images, pyramid: Images, skips: list[Tensor], embedding: Tensor) -> tuple[Images, Images]:
        """Return the features and the pyramid; each of the level's outputs is appended to `skips`."""
        if self.down is not None and self.pyramid is not None:
            pyramid, h = self.pyramid(pyramid, self.down(h, embedding))
            skips.append(h)
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h = attention(block(h, embedding))
            skips.append(h)
        return h, pyramid


class DecoderLevel(nn.Module):
    """Double the image (but for the lowest level), run the residual blocks on features and skips, then attention.

    The last level, or with output_skip every level, makes an image, added to the enlarged one of the level before.
    """

    def __init__(
        self, config: NCSNppConfig, level: int, inputs: int, outputs: int, skips: list[int], embedding: int
    ) -> None:
        """Make the layers of `level`; `skips` are the channels of the encoder outputs it reads."""
        super().__init__()
        lowest = level == len(config.channels) - 1
        self.up = None if lowest else ResidualBlock(inputs, inputs, embedding, config.dropout, FIR(upward=True))
        widths = [inputs] + [outputs] * config.blocks
        self.blocks = nn.ModuleList(
            ResidualBlock(width + skip, outputs, embedding, config.dropout)
            for width, skip in zip(widths, skips, strict=True)
        )
        attend = config.resolutions[level] in config.attention
        self.attention = Attention(outputs) if attend else nn.Identity()
        shown = level == 0 or config.progressive == "output_skip"
        self.image = ToImage(outputs, config.image_channels) if shown else None
        self.enlarge = FIR(upward=True)

    def forward(
        self, h: Images, image: Images | None, skips: list[Tensor], embedding: Tensor
    ) -> tuple[Images, Images | None]:
        """Return the features of the level and the image so far; one of `skips` is popped for each block."""
        if self.up is not None:
            h = self.up(h, embedding)
        for block in self.blocks:
            h = block(torch.cat((h, skips.pop()), dim=1), embedding)
        h = self.attention(h)
        if self.image is not None:
            image = self.image(h) if image is None else self.image(h) + self.enlarge(image)
        return h, image
