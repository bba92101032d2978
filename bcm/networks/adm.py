"""ADM (Dhariwal and Nichol, 2021) as in improved consistency training, with one time or two."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bcm.networks.embeddings import TimeEmbedding, positional
from bcm.networks.unet import Block, DecoderLevel, EncoderLevel, Middle, ResidualBlock, UNetConfig
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


class ADM(nn.Module):
    """F_theta(c_in x_t, t, u), the raw network inside the preconditioning.

    The encoder runs over the levels from the full resolution down, the decoder back up; every encoder output is
    concatenated to one decoder block's input. An untrained network's output is zero.
    """

    def __init__(self, config: ADMConfig) -> None:
        """Build the network of `config` with weights drawn from torch's global generator."""
        super().__init__()
        self.config = config
        features = partial(positional, size=config.width)
        self.embedding = TimeEmbedding(features, config.width, nn.Linear, config, "projected")
        attention = partial(Attention, head_channels=config.head_channels, norm=config.attention_norm)
        inputs = config.channels[0]
        self.first = nn.Conv2d(config.image_channels, inputs, 3, padding=1)
        skips = [inputs]
        self.encoder = nn.ModuleList()
        for level, (outputs, size) in enumerate(zip(config.channels, config.resolutions, strict=True)):
            block = partial(residual_block, config, size)
            down = block(inputs, inputs, nn.AvgPool2d(2)) if level else None
            blocks = [block(before, outputs) for before in ([inputs] + [outputs] * config.blocks)[:-1]]
            attending = [attention(outputs) if size in config.attention else nn.Identity() for _ in blocks]
            self.encoder.append(EncoderLevel(down, blocks, attending))
            skips += [inputs] * (level > 0) + [outputs] * config.blocks
            inputs = outputs
        block = partial(residual_block, config, config.resolutions[-1])
        self.middle = Middle(block(inputs, inputs), attention(inputs), block(inputs, inputs))
        self.decoder = nn.ModuleList()
        for level, (outputs, size) in reversed(list(enumerate(zip(config.channels, config.resolutions, strict=True)))):
            block = partial(residual_block, config, size)
            lowest = level == len(config.channels) - 1
            up = None if lowest else block(inputs, inputs, nn.Upsample(scale_factor=2))
            blocks = [block(before + skips.pop(), outputs) for before in [inputs] + [outputs] * config.blocks]
            attending = [attention(outputs) if size in config.attention else nn.Identity() for _ in blocks]
            self.decoder.append(DecoderLevel(up, blocks, nn.ModuleList(attending)))
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
            h, _ = level(h, skips, embedding)
        h = self.middle(h, embedding)
        for level in self.decoder:
            h = level(h, skips, embedding)
        return self.last(functional.silu(self.last_norm(h)))


class GroupNorm(nn.GroupNorm):
    """Normalisation of 32 groups in float32 at least, whatever autocast says."""

    def __init__(self, channels: int) -> None:
        """Make the scales and shifts."""
        super().__init__(NORM_GROUPS, channels, eps=1e-5)  # pyright: ignore[reportUnknownMemberType]

    def forward(self, input: Images) -> Images:
        """Map (B, C, H, W) to the same shape and dtype."""
        return super().forward(input.to(torch.promote_types(input.dtype, torch.float32))).to(input.dtype)


def residual_block(
    config: ADMConfig, size: int, inputs: int, outputs: int, resample: nn.Module | None = None
) -> ResidualBlock:
    """Make a residual block that starts as the identity, or as its `skip`.

    Args:
        config: the network's.
        size: height and width of the output, which decide on dropout.
        inputs: channels in.
        outputs: channels out.
        resample: halves or doubles the image size on both branches.
    """
    return ResidualBlock(
        norm0=GroupNorm(inputs),
        conv0=nn.Conv2d(inputs, outputs, 3, padding=1),
        time=nn.Linear(4 * config.width, outputs),
        norm1=GroupNorm(outputs),
        dropout=Dropout(config.dropout if size <= config.dropout_resolution else 0.0),
        conv1=zeroed(nn.Conv2d(outputs, outputs, 3, padding=1)),
        skip=nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1),
        resample=resample,
    )


class Attention(Block):
    """Self-attention of several heads over all pixels, added to its input.

    The root mean squares are taken in float32 at least.

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
        if self.normalized:
            full = torch.promote_types(qkv.dtype, torch.float32)
            norm = cast(Tensor, torch.linalg.vector_norm(qkv, dim=-1, keepdim=True, dtype=full))  # pyright: ignore
            qkv = qkv / (norm / math.sqrt(qkv.shape[-1]) + 1e-4).to(qkv.dtype)
        query, key, value = qkv
        h = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x + self.out(h).transpose(1, 2).reshape(x.shape)


def zeroed(layer: Layer) -> Layer:
    """Set the weights and the bias of `layer` to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
