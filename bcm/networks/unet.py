"""What the U-Nets of this package share: part of their configuration, their middle, activation checkpointing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
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


class UNet(nn.Module):
    """A network made of `Block`s."""

    def checkpoint_blocks(self, on: bool) -> None:
        """Keep only the inputs of each block for the backward pass, which then runs it again: less memory, more time.

        Gradients and dropout masks stay the same.
        """
        for block in self.modules():
            if isinstance(block, Block):
                block.recompute = on
