"""ADM (Dhariwal and Nichol, 2021) as in improved consistency training, with one time or two."""

import math
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bcm.networks.embeddings import Positional, TimeEmbedding
from bcm.networks.unet import Block, Middle, UNet, UNetConfig
from bcm.rng import Dropout
from bcm.types import BCMError, Images, Labels, Times

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)

NORM_GROUPS = 32
"""Groups of every normalisation."""


@dataclass(frozen=True, kw_only=True)
class ADMConfig(UNetConfig):
    """The shape of an ADM with additive time embeddings; the defaults are the paper's ImageNet-64 network (280M)."""

    kind: Literal["adm"] = "adm"
    """Tells the networks apart in JSON."""
    resolution: int = 64
    """Height and width of the images; halved between levels."""
    width: int = 192
    """Channels of the first level before its multiplier, a multiple of 32; also the size of the times' features. Levels
    of just 32 channels do not see the times: normalising each channel by itself takes away what the times add."""
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    """Channels of each level over `width`, from the full resolution down."""
    blocks: int = 3
    """Residual blocks of each encoder level (6 in the deep network); decoder levels have one more."""
    attention: tuple[int, ...] = (16, 8)
    """Resolutions of the levels with attention; the middle always has it."""
    head_channels: int = 64
    """Channels of each attention head; they divide the channels of every level with attention."""
    attention_norm: str = "qkv"
    """What attention normalises: qkv, each query, key and value by its root mean square (Appendix C.1); none."""
    dropout: float = 0.2
    """Probability of dropping a value inside a residual block, in [0, 1)."""
    dropout_resolution: int = 16
    """Largest resolution with dropout."""
    classes: int = 1000
    """Number of class labels, 0 for an unconditional network."""

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        if self.width % NORM_GROUPS:
            raise BCMError(f"width is {self.width}; group normalisation needs a multiple of {NORM_GROUPS}")
        if self.dropout_resolution < 0:
            raise BCMError(f"dropout_resolution is {self.dropout_resolution}; it must be 0 (no dropout) or a size")
        attending = {c for c, size in zip(self.channels, self.resolutions, strict=True) if size in self.attention}
        for channels in sorted({*attending, self.channels[-1]}):
            if self.head_channels < 1 or channels % self.head_channels:
                raise BCMError(
                    f"head_channels is {self.head_channels}; it must divide the {channels} channels of a level with "
                    "attention (the lowest always has it)"
                )
        self.check_choice("attention_norm", ("qkv", "none"))


class ADM(UNet):
    """F_theta(c_in x_t, t, u), the raw network inside the preconditioning.

    The encoder runs over the levels from the full resolution down, the decoder back up; every encoder output is
    concatenated to one decoder block's input. An untrained network's output is zero.
    """

    def __init__(self, config: ADMConfig) -> None:
        """Build the network of `config` with weights drawn from torch's global generator."""
        super().__init__()
        self.config = config
        self.embedding = TimeEmbedding(
            Positional(config.width),
            nn.Linear,
            width=config.width,
            times=config.times,
            form="projected",
            classes=config.classes,
        )
        inputs = config.channels[0]
        self.first = nn.Conv2d(config.image_channels, inputs, 3, padding=1)
        skips = [inputs]
        self.encoder = nn.ModuleList()
        for level, outputs in enumerate(config.channels):
            self.encoder.append(EncoderLevel(config, level, inputs, outputs))
            skips += [inputs] * (level > 0) + [outputs] * config.blocks
            inputs = outputs
        self.middle = Middle(
            ResidualBlock(config, inputs, inputs, config.resolutions[-1]),
            Attention(inputs, config.head_channels, config.attention_norm),
            ResidualBlock(config, inputs, inputs, config.resolutions[-1]),
        )
        self.decoder = nn.ModuleList()
        for level, outputs in reversed(list(enumerate(config.channels))):
            level_skips = [skips.pop() for _ in range(config.blocks + 1)]
            self.decoder.append(DecoderLevel(config, level, inputs, outputs, level_skips))
            inputs = outputs
        self.last_norm = GroupNorm(inputs)
        self.last = zeroed(nn.Conv2d(inputs, config.image_channels, 3, padding=1))

    def forward(self, x: Images, t: Times, u: Times, label: Labels | None = None) -> Images:
        """Compute F; arguments and errors are those of `NCSNpp.forward`."""
        self.config.check_inputs(x, t, u)
        embedding = self.embedding(t, u, label)
        h = self.first(x)
        skips = [h]
        for level in self.encoder:
            h = level(h, skips, embedding)
        h = self.middle(h, embedding)
        for level in self.decoder:
            h = level(h, skips, embedding)
        return self.last(functional.silu(self.last_norm(h)))


class EncoderLevel(nn.Module):
    """Halve the image (but for the first level), then run residual blocks, each followed by attention if asked for."""

    def __init__(self, config: ADMConfig, level: int, inputs: int, outputs: int) -> None:
        """Make the layers of `level`."""
        super().__init__()
        size = config.resolutions[level]
        self.down = ResidualBlock(config, inputs, inputs, size, nn.AvgPool2d(2)) if level else None
        widths = [inputs] + [outputs] * config.blocks
        self.blocks = nn.ModuleList(
            ResidualBlock(config, widths[index], outputs, size) for index in range(config.blocks)
        )
        self.attention = nn.ModuleList(_attention(config, outputs, size) for _ in self.blocks)

    def forward(self, h: Images, skips: list[Tensor], embedding: Tensor) -> Images:
        """Return the features; each of the level's outputs is appended to `skips`."""
        if self.down is not None:
            h = self.down(h, embedding)
            skips.append(h)
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h = attention(block(h, embedding))
            skips.append(h)
        return h


class DecoderLevel(nn.Module):
    """Double the image (but for the lowest level), then run residual blocks on features and skips, with attention."""

    def __init__(self, config: ADMConfig, level: int, inputs: int, outputs: int, skips: list[int]) -> None:
        """Make the layers of `level`; `skips` are the channels of the encoder outputs it reads."""
        super().__init__()
        lowest, size = level == len(config.channels) - 1, config.resolutions[level]
        self.up = None if lowest else ResidualBlock(config, inputs, inputs, size, nn.Upsample(scale_factor=2))
        widths = [inputs] + [outputs] * config.blocks
        self.blocks = nn.ModuleList(
            ResidualBlock(config, width + skip, outputs, size) for width, skip in zip(widths, skips, strict=True)
        )
        self.attention = nn.ModuleList(_attention(config, outputs, size) for _ in self.blocks)

    def forward(self, h: Images, skips: list[Tensor], embedding: Tensor) -> Images:
        """Return the features of the level; one of `skips` is popped for each block."""
        if self.up is not None:
            h = self.up(h, embedding)
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h = attention(block(torch.cat((h, skips.pop()), dim=1), embedding))
        return h


class GroupNorm(nn.GroupNorm):
    """Normalisation of 32 groups in float32 at least, whatever autocast says."""

    def __init__(self, channels: int) -> None:
        """Make the scales and shifts."""
        super().__init__(NORM_GROUPS, channels, eps=1e-5)  # pyright: ignore[reportUnknownMemberType]

    def forward(self, input: Images) -> Images:
        """Map (B, C, H, W) to the same shape and dtype."""
        return super().forward(input.to(torch.promote_types(input.dtype, torch.float32))).to(input.dtype)


class ResidualBlock(Block):
    """Norm, SiLU, resample, conv, + time, norm, SiLU, dropout, conv; added to the input.

    Args:
        config: the network's.
        inputs: channels in.
        outputs: channels out.
        size: height and width of the output, which decide on dropout.
        resample: halves or doubles the image size on both branches.
    """

    def __init__(
        self, config: ADMConfig, inputs: int, outputs: int, size: int, resample: nn.Module | None = None
    ) -> None:
        """Make the layers."""
        super().__init__()
        self.resample = nn.Identity() if resample is None else resample
        self.norm0 = GroupNorm(inputs)
        self.conv0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(4 * config.width, outputs)
        self.norm1 = GroupNorm(outputs)
        self.dropout = Dropout(config.dropout if size <= config.dropout_resolution else 0.0)
        self.conv1 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Images, embedding: Tensor) -> Images:
        """Map (B, inputs, H, W) and the activated time embedding (B, width) to (B, outputs, H', W')."""
        h = self.conv0(self.resample(functional.silu(self.norm0(x))))
        h = h + self.time(embedding)[:, :, None, None]
        h = self.conv1(self.dropout(functional.silu(self.norm1(h))))
        return self.skip(self.resample(x)) + h


class Attention(Block):
    """Self-attention of several heads over all pixels, added to its input.

    Args:
        channels: channels in and out.
        head_channels: channels of each head.
        norm: qkv divides queries, keys and values by their root mean square over the head's channels; none does not.
    """

    def __init__(self, channels: int, head_channels: int, norm: str) -> None:
        """Make the layers."""
        super().__init__()
        self.normalized = norm == "qkv"
        self.heads = channels // head_channels
        self.norm = GroupNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Images) -> Images:
        """Map (B, C, H, W) to the same shape."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(pixels).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = _over_rms(qkv) if self.normalized else qkv
        h = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x + self.out(h).transpose(1, 2).reshape(x.shape)


def zeroed(layer: Layer) -> Layer:
    """Set the weights and the bias of `layer` to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _attention(config: ADMConfig, channels: int, size: int) -> nn.Module:
    """Attention where this level has it."""
    if size not in config.attention:
        return nn.Identity()
    return Attention(channels, config.head_channels, config.attention_norm)


def _over_rms(x: Tensor) -> Tensor:
    """Divide by the root mean square of the last dimension, taken in float32 at least, plus 1e-4."""
    full = torch.promote_types(x.dtype, torch.float32)
    norm = cast(Tensor, torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=full))  # pyright: ignore
    return x / (norm / math.sqrt(x.shape[-1]) + 1e-4).to(x.dtype)
