"""Randomness that depends on explicit integers alone: never on batch, rank, thread or device.

The words come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). Its 192 bits of
key and counter are laid out without overlap, so different arguments never share a word:

    key     = seed, low 32 bits | seed, high 32 bits
    counter = block of four words | step | id, low 32 bits | stream * 2^16 + id, high 16 bits
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import torch
from torch import Tensor, nn

from bcm.types import BCMError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_ID_BITS = 48


class Stream(IntEnum):
    """What the randomness is for; different streams of one seed are independent. The numbers never change meaning."""

    NOISE = 0
    """The noise z that turns training images into x_t."""
    TIMES = 1
    """The times t_n, u of a training step."""
    DROPOUT = 2
    """The seeds of the dropout masks."""
    SAMPLE = 3
    """The noise at t_max that generation starts from."""
    RENOISE = 4
    """The noise added between the steps of a sampler."""
    INVERSION = 5
    """The small noise added before inversion."""
    EDIT = 6
    """The noise of the editors."""


def random_words(seed: int, stream: int, step: int, ids: Tensor, count: int) -> Tensor:
    """Draw 32-bit random words, row k from (`seed`, `stream`, `step`, `ids[k]`) alone.

    Args:
        seed: in [0, 2^64).
        stream: a `Stream`, or any number in [0, 2^16).
        step: in [0, 2^32).
        ids: (B,) int64 in [0, 2^48); the range is checked on the CPU only, for the check would stall a GPU.
        count: words per row, in [0, 2^34]; the first words of a row do not depend on it.

    Returns:
        (B, count) int64 in [0, 2^32), on the device of `ids`.

    Raises:
        BCMError: an argument is out of its range, or `ids` is not (B,) int64.
    """
    words = _philox_rows(seed, stream, step, ids, count)
    return words.permute(1, 2, 0).flatten(1)[:, :count]


def uniform(seed: int, stream: int, step: int, ids: Tensor, count: int) -> Tensor:
    """Draw uniform numbers in [0, 1) of 53 bits, (B, `count`) float64; arguments as in `random_words`."""
    words = random_words(seed, stream, step, ids, 2 * count)
    return ((words[:, 0::2] >> 5) * 2**26 + (words[:, 1::2] >> 6)).double() * 2.0**-53


def normal(seed: int, stream: int, step: int, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal noise, (B, *`shape`) float32 with tails to 6.7; arguments as in `random_words`.

    Box-Muller in additions, products, quotients and roots only, which IEEE 754 rounds in one way everywhere: library
    logarithms and cosines differ between devices, and between the middle and the end of a vector.
    """
    rows, size = ids.shape[0], math.prod(shape)
    words = _philox_rows(seed, stream, step, ids, size)
    # A float32 root may be off by one bit on a CPU; a float64 root, even so, rounds to the one right float32.
    radius = _minus_log(words[0::2]).double().sqrt_().float()
    bits = words[1::2].to(torch.int32)
    cosine, sine = _rotation(bits)
    noise = torch.empty(rows, 2, 2, words.shape[-1], device=ids.device)
    # The angle covers the first quadrant (as pi/4 plus the rotation's); the two highest bits are the signs.
    for half, (coordinate, sign) in enumerate(((cosine - sine, bits), (cosine.add_(sine), bits << 1))):
        coordinate.mul_(radius).view(torch.int32).bitwise_xor_(sign & -(2**31))
        noise[:, half] = coordinate.transpose(0, 1)
    return noise.flatten(1)[:, :size].reshape(rows, *shape)


def _minus_log(words: Tensor) -> Tensor:
    """-ln((w + 1/2) / 2^32) = (32 - e) ln 2 - 2 artanh((m - 1) / (m + 1)) with m in [0.75, 1.5), float32."""
    bits = words.to(torch.float32).add_(0.5).view(torch.int32)
    shifted = bits - 0x3F400000
    exponent = shifted >> 23
    mantissa = shifted.bitwise_and_(0x7FFFFF).add_(0x3F400000).view(torch.float32)
    ratio = (mantissa - 1).div_(mantissa + 1)
    series = _polynomial(ratio * ratio, (2, 2 / 3, 2 / 5, 2 / 7, 2 / 9))
    return exponent.sub_(32).to(torch.float32).mul_(-math.log(2)).sub_(series.mul_(ratio))


def _rotation(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of an angle in [-pi/4, pi/4) taken from the low 30 bits, float32 Taylor series."""
    angle = (bits & (2**30 - 1)).sub_(2**29).to(torch.float32).mul_(math.pi / 4 / 2**29)
    square = angle * angle
    cosine = _polynomial(square, tuple((-1) ** k / math.factorial(2 * k) for k in range(6)))
    sine = _polynomial(square, tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(5)))
    return cosine, sine.mul_(angle)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's rule, each product and each sum rounded by itself (a fused one would depend on the device)."""
    total = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        total.add_(coefficient).mul_(x)
    return total.add_(coefficients[0])


def _philox_rows(seed: int, stream: int, step: int, ids: Tensor, count: int) -> Tensor:
    """The blocks of `random_words` as (4, B, blocks): word j of block i is word 4 i + j of the row."""
    for name, value, bits in (("seed", seed, 64), ("stream", stream, 16), ("step", step, 32)):
        if not 0 <= value < 2**bits:
            raise BCMError(f"{name} is {value}; it must lie in [0, 2^{bits})")
    if not 0 <= count <= 2**34:
        raise BCMError(f"{count} random words are asked for each row; a row has at most 2^34")
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise BCMError(f"ids must be int64 of shape (B,), not {ids.dtype} of shape {tuple(ids.shape)}")
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < 2**_ID_BITS:
        raise BCMError(f"ids span {int(ids.min())} to {int(ids.max())}; they must lie in [0, 2^{_ID_BITS})")
    counter = torch.empty(4, ids.shape[0], -(-count // 4), dtype=torch.int64, device=ids.device)
    counter[0] = torch.arange(counter.shape[2], device=ids.device)
    counter[1] = step
    counter[2] = (ids & _MASK)[:, None]
    counter[3] = (ids >> 32 & 0xFFFF | stream << 16)[:, None]
    return philox((seed & _MASK, seed >> 32), counter)


def philox(key: tuple[int, int], counter: Tensor) -> Tensor:
    """Philox4x32-10: the (4, ...) int64 words of the counters -> as many random words; all are in [0, 2^32)."""
    c0, c1, c2, c3 = counter.clone().unbind()
    for index in range(_ROUNDS):
        # int64 products wrap around modulo 2^64, so their bits are those of the unsigned product.
        c0 *= _MULTIPLIERS[0]
        c2 *= _MULTIPLIERS[1]
        c1 ^= (key[0] + index * _WEYL[0]) & _MASK
        c1 ^= c2 >> 32
        c1 &= _MASK
        c3 ^= (key[1] + index * _WEYL[1]) & _MASK
        c3 ^= c0 >> 32
        c3 &= _MASK
        c0, c1, c2, c3 = c1, c2, c3, c0
    return torch.stack((c0, c1, c2, c3)).bitwise_and_(_MASK)


class Dropout(nn.Module):
    """Dropout whose mask can be shared by several calls, see `shared_dropout`.

    Args:
        p: the probability of dropping a value, in [0, 1).
    """

    def __init__(self, p: float) -> None:
        """Check `p`."""
        super().__init__()
        if not 0 <= p < 1:
            raise BCMError(f"dropout is {p}; it must lie in [0, 1)")
        self.p = p
        self.shared: _SharedMask | None = None
        self.draw: Callable[[int, int], Tensor] | None = None
        """(seed, rows) -> a mask like the last one."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop values of `x`, any shape with the batch first, when training; in evaluation return it as it is."""
        if not self.training or self.p == 0:
            return x
        if self.shared is None:
            return nn.functional.dropout(x, self.p)
        if x.shape[0] % self.shared.rows:
            raise BCMError(
                f"a batch of {x.shape[0]} images cannot share dropout masks of {self.shared.rows} rows; "
                "give shared_dropout the number of images of one pass"
            )
        mask = self.shared.mask
        if mask is None or mask.shape[1:] != x.shape[1:] or mask.dtype != x.dtype or mask.device != x.device:
            last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if last else torch.contiguous_format
            self.draw = partial(_mask, self.p, tuple(x.shape[1:]), x.dtype, x.device, layout)
            mask = self.shared.mask = self.draw(self.shared.seed, self.shared.rows)
        return (x.reshape(-1, *mask.shape) * mask).reshape(x.shape)


@dataclass
class _SharedMask:
    """The mask of one layer inside `shared_dropout`."""

    seed: int
    rows: int
    mask: Tensor | None = None


def _mask(
    p: float,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    layout: torch.memory_format,
    seed: int,
    rows: int,
) -> Tensor:
    """Zeros with probability `p`, else 1 / (1 - p), (`rows`, *`shape`)."""
    generator = torch.Generator(device).manual_seed(seed)
    chance = torch.rand(rows, *shape, generator=generator, device=device)
    return (chance >= p).to(dtype).div_(1 - p).contiguous(memory_format=layout)


@contextmanager
def shared_dropout(module: nn.Module, seed: int, rows: int) -> Generator[None]:
    """Give every `Dropout` of `module` one mask for all calls inside the context.

    A layer's mask depends on `seed`, on its place among the dropout layers and on the kind of device. It has `rows`
    rows, repeated where a batch holds several passes over the same images. Two copies of a network get the same masks
    from the same seed. Where activations are computed again in the backward pass, that must run inside too.

    Args:
        module: the network, wrapped or not.
        seed: in [0, 2^64), another one for each training step and rank.
        rows: images of one pass, positive.

    Raises:
        BCMError: `seed` or `rows` is out of range; inside the context, a batch is no multiple of `rows`.
    """
    if rows < 1:
        raise BCMError(f"shared dropout needs at least one row, not {rows}")
    layers = [layer for layer in module.modules() if isinstance(layer, Dropout)]
    before = [layer.shared for layer in layers]
    seeds = random_words(seed, Stream.DROPOUT, 0, torch.arange(len(layers)), 1)[:, 0]
    for layer, layer_seed in zip(layers, seeds, strict=True):
        layer.shared = _SharedMask(int(layer_seed), rows)
        if layer.draw is not None and layer.training:  # at once, so that compiled code, which cannot draw, finds it
            layer.shared.mask = layer.draw(layer.shared.seed, rows)
    try:
        yield
    finally:
        for layer, shared in zip(layers, before, strict=True):
            layer.shared = shared
