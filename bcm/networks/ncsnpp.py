"""NCSN++ (Song et al., 2021) as in improved consistency training, with one time or two."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from bcm.networks.embeddings import Fourier, TimeEmbedding
from bcm.networks.layers import FIR, ZERO, Attention, Pyramid, conv, group_norm, linear, residual_block
from bcm.networks.unet import DecoderLevel, EncoderLevel, Middle, UNetConfig
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


class NCSNpp(nn.Module):
    """F_theta(c_in x_t, t, u), the raw network inside the preconditioning.

    The encoder runs over the levels from the full resolution down, the decoder back up. Smaller and smaller copies of
    the input, the input pyramid, are mixed into the features between encoder levels. Every encoder output is
    concatenated to one decoder block's input. An untrained network's output is nearly zero.
    """

    def __init__(self, config: NCSNppConfig) -> None:
        """Build the network of `config` with weights drawn from torch's global generator."""
        super().__init__()
        self.config = config
        features = Fourier(config.width, config.fourier_scale)
        self.embedding = TimeEmbedding(features, 2 * config.width, linear, config, config.embedding)
        block = partial(residual_block, self.embedding.size, config.dropout)
        self.first = conv(config.image_channels, config.width)
        inputs, pyramid, residual = config.width, config.image_channels, config.progressive_input == "residual"
        skips = [inputs]
        self.encoder = nn.ModuleList()
        for level, (outputs, size) in enumerate(zip(config.channels, config.resolutions, strict=True)):
            down = block(inputs, inputs, FIR()) if level else None
            mix = Pyramid(pyramid, inputs, residual=residual) if level else None
            blocks = [block(before, outputs) for before in ([inputs] + [outputs] * config.blocks)[:-1]]
            attention = [Attention(outputs) if size in config.attention else nn.Identity() for _ in blocks]
            self.encoder.append(EncoderLevel(down, blocks, attention, mix))
            skips += [inputs] * (level > 0) + [outputs] * config.blocks
            pyramid, inputs = (inputs if level and residual else pyramid), outputs
        self.middle = Middle(block(inputs, inputs), Attention(inputs), block(inputs, inputs))
        self.decoder = nn.ModuleList()
        for level, (outputs, size) in reversed(list(enumerate(zip(config.channels, config.resolutions, strict=True)))):
            up = None if level == len(config.channels) - 1 else block(inputs, inputs, FIR(upward=True))
            blocks = [block(before + skips.pop(), outputs) for before in [inputs] + [outputs] * config.blocks]
            attention = Attention(outputs) if size in config.attention else nn.Identity()
            image = None
            if level == 0 or config.progressive == "output_skip":
                last = conv(outputs, config.image_channels, scale=ZERO)
                image = nn.Sequential(OrderedDict(norm=group_norm(outputs), activation=nn.SiLU(), conv=last))
            self.decoder.append(DecoderLevel(up, blocks, attention, image))
            inputs = outputs
        self.enlarge = FIR(upward=True)

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
            h, pyramid = level(h, skips, embedding, pyramid)
        h = self.middle(h, embedding)
        for level in self.decoder:
            h = level(h, skips, embedding)
            if isinstance(level.image, nn.Module):
                image = level.image(h) if image is None else level.image(h) + self.enlarge(image)
        assert image is not None
        return image
