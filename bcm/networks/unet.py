"""What the U-Nets of this package share: part of their configuration, blocks, levels, activation checkpointing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from bcm.rng import Dropout
from bcm.types import BCMError, Images, Times


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Levels of halving resolution, each with the same number of residual blocks."""

    image_channels: int = 3
    """Channels of the images."""
    resolution: int
    """Height and width of the images; halved between levels."""
    width: int
    """Channels of the first level before its multiplier."""
    channel_mult: tuple[int, ...]
    """Channels of each level over `width`, from the full resolution down."""
    blocks: int
    """Residual blocks of each encoder level; decoder levels have one more."""
    attention: tuple[int, ...]
    """Resolutions of the levels with attention; the middle always has it."""
    dropout: float
    """Probability of dropping a value inside a residual block, in [0, 1)."""
    times: int = 2
    """1 reads t alone (a consistency model), 2 reads t and u (a bidirectional one)."""
    classes: int = 0
    """Number of class labels, 0 for an unconditional network."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("image_channels", "resolution", "width", "blocks"):
            if getattr(self, name) < 1:
                raise BCMError(f"{name} is {getattr(self, name)}; it must be positive")
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

    def check_choice(self, name: str, known: tuple[str, ...]) -> None:
        """Raise `BCMError` unless the field `name` is one of the `known` names."""
        if getattr(self, name) not in known:
            raise BCMError(f"{name} is {getattr(self, name)!r}; known are {', '.join(known)}")

    def check_inputs(self, x: Images, t: Times, u: Times) -> None:
        """Raise `BCMError` unless the images and the times that the network reads have the shapes it was built for."""
        size = (self.image_channels, self.resolution, self.resolution)
        if x.shape[1:] != size:
            raise BCMError(f"the network was built for images of {size}, but these are {tuple(x.shape[1:])}")
        for name, times in (("t", t), ("u", u))[: self.times]:
            if times.shape != x.shape[:1]:
                raise BCMError(f"{name} has shape {tuple(times.shape)}; give one time for each of {len(x)} images")


class Block(nn.Module):
    """A part of a network whose activations can be computed again in the backward pass instead of being kept."""

    recompute = False

    def __call__(self, *inputs: Any) -> Any:
        """Run `forward`; where `recompute` is set and gradients are wanted, keep nothing but the inputs."""
        if not (self.recompute and torch.is_grad_enabled()):
            return super().__call__(*inputs)
        layers = [layer for layer in self.modules() if isinstance(layer, Dropout)]
        masks = [layer.shared for layer in layers]
        drawn = any(layer.training and layer.p > 0 and layer.shared is None for layer in layers)
        run: Callable[..., Any] = super().__call__

        def again(*inputs: Any) -> Any:
            # The backward pass may come after `shared_dropout` has ended, so each run brings its masks along.
            before = [layer.shared for layer in layers]
            for layer, mask in zip(layers, masks, strict=True):
                layer.shared = mask
            try:
                return run(*inputs)
            finally:
                for layer, mask in zip(layers, before, strict=True):
                    layer.shared = mask

        # Compiled code has taken the masks as its inputs, and may not change attributes.
        function = run if torch.compiler.is_compiling() else again
        return cast(Any, checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=drawn))


class ResidualBlock(Block):
    """Norm, SiLU, resample, conv, + time, norm, SiLU, dropout, conv; added to the input, the sum times `scale`."""

    def __init__(
        self,
        *,
        norm0: nn.Module,
        conv0: nn.Module,
        time: nn.Module,
        norm1: nn.Module,
        dropout: Dropout,
        conv1: nn.Module,
        skip: nn.Module,
        resample: nn.Module | None,
        scale: float = 1.0,
    ) -> None:
        """Take the layers; `resample`, if any, halves or doubles the image size on both branches."""
        super().__init__()
        self.resample = nn.Identity() if resample is None else resample
        self.norm0, self.conv0 = norm0, conv0
        self.time = time
        self.norm1, self.dropout, self.conv1 = norm1, dropout, conv1
        self.skip = skip
        self.scale = scale

    def forward(self, x: Images, embedding: Tensor) -> Images:
        """Map (B, inputs, H, W) and the activated time embedding (B, width) to (B, outputs, H', W')."""
        h = self.conv0(self.resample(functional.silu(self.norm0(x))))
        h = h + self.time(embedding)[:, :, None, None]
        h = self.conv1(self.dropout(functional.silu(self.norm1(h))))
        h = self.skip(self.resample(x)) + h
        return h if self.scale == 1 else h.mul_(self.scale)


class EncoderLevel(nn.Module):
    """Halve the image, mix in the input pyramid, then run residual blocks, each followed by attention.

    Args:
        down: halves the image; None in the first level.
        blocks: the residual blocks.
        attention: as many modules, the identity where there is none.
        pyramid: maps the input pyramid and the features to the next ones, if the network has such a pyramid.
    """

    def __init__(
        self,
        down: Block | None,
        blocks: Sequence[Block],
        attention: Sequence[nn.Module],
        pyramid: nn.Module | None = None,
    ) -> None:
        """Take the layers."""
        super().__init__()
        self.down = down
        self.pyramid = pyramid
        self.blocks = nn.ModuleList(blocks)
        self.attention = nn.ModuleList(attention)

    def forward(
        self, h: Images, skips: list[Tensor], embedding: Tensor, pyramid: Images | None = None
    ) -> tuple[Images, Images | None]:
        """Return the features and the pyramid; each of the level's outputs is appended to `skips`."""
        if self.down is not None:
            h = self.down(h, embedding)
            if self.pyramid is not None:
                pyramid, h = self.pyramid(pyramid, h)
            skips.append(h)
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h = attention(block(h, embedding))
            skips.append(h)
        return h, pyramid


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, block0: Block, attention: Block, block1: Block) -> None:
        """Take the layers."""
        super().__init__()
        self.block0 = block0
        self.attention = attention
        self.block1 = block1

    def forward(self, h: Images, embedding: Tensor) -> Images:
        """Map the features to features of the same shape."""
        return self.block1(self.attention(self.block0(h, embedding)), embedding)


class DecoderLevel(nn.Module):
    """Double the image, then run residual blocks on features and skips, with attention.

    Args:
        up: doubles the image; None in the lowest level.
        blocks: the residual blocks.
        attention: a list of as many modules, one after each block, or a single one after the last.
        image: makes an image of the level's features, for the network to call, if it does so.
    """

    def __init__(
        self, up: Block | None, blocks: Sequence[Block], attention: nn.Module, image: nn.Module | None = None
    ) -> None:
        """Take the layers."""
        super().__init__()
        self.up = up
        self.blocks = nn.ModuleList(blocks)
        self.attention = attention
        self.image = image

    def forward(self, h: Images, skips: list[Tensor], embedding: Tensor) -> Images:
        """Return the features of the level; one of `skips` is popped for each block."""
        if self.up is not None:
            h = self.up(h, embedding)
        after_each = self.attention if isinstance(self.attention, nn.ModuleList) else None
        for index, block in enumerate(self.blocks):
            h = block(torch.cat((h, skips.pop()), dim=1), embedding)
            h = h if after_each is None else after_each[index](h)
        return self.attention(h) if after_each is None else h
