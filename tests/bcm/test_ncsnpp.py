"""NCSN++: sizes, initialisation, pyramids, labels, times. Its values are checked in test_convert.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bcm.networks import NCSNpp, NCSNppConfig
from bcm.networks.embeddings import Fourier
from bcm.networks.layers import FIR
from bcm.rng import Dropout, shared_dropout
from bcm.types import BCMError

LSUN = dict(
    resolution=256,
    channel_mult=(1, 1, 2, 2, 2, 2, 2),
    blocks=2,
    progressive="output_skip",
    progressive_input="input_skip",
)


def tiny(**changes: object) -> NCSNppConfig:
    values: dict[str, object] = dict(
        image_channels=1, resolution=8, width=8, channel_mult=(1, 2), blocks=1, attention=(), dropout=0.0
    )
    return NCSNppConfig(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def batch(config: NCSNppConfig, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, config.image_channels, config.resolution, config.resolution, generator=generator)
    t = torch.linspace(0.1, 80, rows, dtype=torch.float64)
    return x, t, t.flip(0) + 1


def awake(net: NCSNpp) -> NCSNpp:
    """Give every weight a size that matters: at initialisation the zero-init layers hide most of the network."""
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return net


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (NCSNppConfig(times=1), 56.40),
        (NCSNppConfig(), 61.90),
        (NCSNppConfig(times=1, blocks=8), 97.6),
        (NCSNppConfig(blocks=8), 106.3),
        (NCSNppConfig(times=1, **LSUN), 65.57),  # pyright: ignore[reportArgumentType]
        (NCSNppConfig(**LSUN), 72.33),  # pyright: ignore[reportArgumentType]
    ],
)
def test_has_the_published_number_of_parameters(config: NCSNppConfig, millions: float) -> None:
    with torch.device("meta"):
        net = NCSNpp(config)
    digits = 2 if millions < 97 else 1
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6, digits) == millions


def test_the_frequencies_are_saved_and_not_trained() -> None:
    net = NCSNpp(tiny())
    assert "embedding.features.frequencies" in net.state_dict()
    assert "embedding.features.frequencies" not in dict(net.named_parameters())
    assert float(Fourier(4000, scale=0.02).frequencies.std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny(blocks=2, attention=(4,)),
        tiny(attention=(8, 4), image_channels=3),
        tiny(width=32, channel_mult=(1,), attention=(8,)),
        tiny(width=4, channel_mult=(1, 2, 3, 1)),
        tiny(times=1),
        tiny(classes=10),
        tiny(width=36, channel_mult=(1, 4)),
        tiny(channel_mult=(1, 2, 1), progressive="output_skip", progressive_input="input_skip", image_channels=3),
        tiny(embedding="projected", classes=10),
    ],
)
def test_output_has_the_shape_of_the_images_and_starts_near_zero(config: NCSNppConfig) -> None:
    torch.manual_seed(0)
    net = NCSNpp(config)
    x, t, u = batch(config)
    label = torch.tensor([0, 3, 9]) if config.classes else None
    output = net(x, t, u, label).detach()
    assert output.shape == x.shape
    assert output.dtype == x.dtype
    # The last convolution's weights have standard deviation 1e-5 of the usual.
    assert 0 < float(output.abs().max()) < 1e-4
    awake(net)(x, t, u, label).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        # Attention over one pixel reads neither queries nor keys; a key's bias never matters.
        assert float(parameter.grad.abs().max()) > 0 or "query" in name or "key" in name, name


def test_initial_weights_have_the_published_spread() -> None:
    torch.manual_seed(0)
    net = NCSNpp(tiny(width=64))
    middle: Any = net.middle
    block, attention = middle.block0, middle.attention
    # Xavier uniform: variance 2 / (fan in + fan out), times the layer's scale.
    expected = {
        block.conv0: 2 / (9 * (128 + 128)),
        block.conv1: 1e-10 * 2 / (9 * (128 + 128)),
        block.time: 2 / (8 * 64 + 128),
        attention.query: 0.1 / 128,
        attention.key: 0.1 / 128,
        attention.value: 0.1 / 128,
        attention.out: 1e-10 / 128,
    }
    for layer, variance in expected.items():
        weight = layer.weight.detach()
        assert float(weight.std()) == pytest.approx(math.sqrt(variance), rel=0.05)
        assert float(weight.abs().max()) <= math.sqrt(3 * variance)
        assert layer.bias is not None and not layer.bias.any()


def test_u_matters_with_two_times_only() -> None:
    for times in (1, 2):
        net = awake(NCSNpp(tiny(times=times, fourier_scale=1.0)))
        x, t, u = batch(net.config)
        change = (net(x, t, u) - net(x, t, u / 2)).abs().amax(dim=(1, 2, 3))
        assert (change > 1e-3).all() if times == 2 else (change == 0).all()
        assert ((net(x, t, u) - net(x, t / 2, u)).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


def test_t_and_u_play_different_parts() -> None:
    net = awake(NCSNpp(tiny(fourier_scale=1.0)))
    x, t, u = batch(net.config)
    assert ((net(x, t, u) - net(x, u, t)).abs() > 1e-3).any()


def test_images_of_a_batch_do_not_mix() -> None:
    net = awake(NCSNpp(tiny(attention=(4,)))).eval()
    x, t, u = batch(net.config, rows=5)
    whole = net(x, t, u)
    for row in range(5):
        one = slice(row, row + 1)
        torch.testing.assert_close(net(x[one], t[one], u[one]), whole[one])


def test_times_keep_their_precision_until_after_the_logarithm() -> None:
    net: Any = NCSNpp(tiny())
    t = torch.tensor([0.002, 79.9], dtype=torch.float64)
    features = net.embedding.features(t)
    angles = 2 * math.pi * net.embedding.features.frequencies.double() * t.log()[:, None] / 4
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.double(), torch.cat((angles.sin(), angles.cos()), 1), rtol=0, atol=1e-6)


def test_labels_are_asked_for_checked_and_used() -> None:
    net = awake(NCSNpp(tiny(classes=4)))
    x, t, u = batch(net.config)
    label = torch.tensor([0, 3, 1])
    change = (net(x, t, u, label) - net(x, t, u, torch.tensor([0, 2, 1]))).abs().amax(dim=(1, 2, 3))
    assert change[0] == change[2] == 0
    assert change[1] > 1e-3
    with pytest.raises(BCMError, match="has 4 classes and needs a label"):
        net(x, t, u)
    with pytest.raises(BCMError, match="labels span 0 to 4"):
        net(x, t, u, torch.tensor([0, 4, 1]))
    with pytest.raises(BCMError, match="labels span -1 to 1"):
        net(x, t, u, torch.tensor([0, -1, 1]))
    with pytest.raises(BCMError, match="given to an unconditional network"):
        NCSNpp(tiny())(x, t, u, label)


def test_shapes_that_do_not_fit_are_refused() -> None:
    net = NCSNpp(tiny())
    x, t, u = batch(net.config)
    with pytest.raises(BCMError, match=r"built for images of \(1, 8, 8\)"):
        net(torch.zeros(3, 1, 16, 16), t, u)
    with pytest.raises(BCMError, match=r"t has shape \(2,\)"):
        net(x, t[:2], u)
    with pytest.raises(BCMError, match=r"u has shape \(1,\)"):
        net(x, t, u[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 30}, "width is 30"),
        ({"width": 0}, "width is 0"),
        ({"blocks": 0}, "blocks is 0"),
        ({"image_channels": 0}, "image_channels is 0"),
        ({"resolution": 12, "channel_mult": (1, 1, 1, 1)}, "cannot be halved 3 times"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"channel_mult": (1, 0)}, "channel_mult"),
        ({"attention": (16,)}, r"attention at \[16\]"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"fourier_scale": 0.0}, "fourier_scale is 0.0"),
        ({"times": 3}, "times is 3"),
        ({"classes": -1}, "classes is -1"),
        ({"progressive": "skip"}, "progressive is 'skip'; known are none, output_skip"),
        ({"progressive_input": "none"}, "progressive_input is 'none'"),
        ({"embedding": "tied"}, "embedding is 'tied'; known are joint, projected"),
    ],
)
def test_impossible_configurations_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(BCMError, match=message):
        tiny(**change)


def test_dropout_acts_in_training_only_and_is_shared_in_the_context() -> None:
    net = awake(NCSNpp(tiny(dropout=0.3)))
    x, t, u = batch(net.config)
    assert len([layer for layer in net.modules() if isinstance(layer, Dropout)]) == 10
    assert not torch.equal(net(x, t, u), net(x, t, u))
    with shared_dropout(net, seed=1, rows=3):
        first = net(x, t, u)
        assert torch.equal(net(x, t, u), first)
        twice = net(x.repeat(2, 1, 1, 1), t.repeat(2), u.repeat(2))
    torch.testing.assert_close(twice, first.repeat(2, 1, 1, 1))
    net.eval()
    assert torch.equal(net(x, t, u), net(x, t, u))


def test_input_skip_adds_smaller_copies_of_the_input_and_output_skip_sums_larger_images() -> None:
    net: Any = awake(
        NCSNpp(tiny(channel_mult=(1, 2, 1), progressive="output_skip", progressive_input="input_skip", times=1))
    )
    x, t, u = batch(net.config)
    seen: dict[nn.Module, tuple[Any, Any]] = {}
    for module in net.modules():
        module.register_forward_hook(lambda module, inputs, output: seen.update({module: (inputs, output)}))
    output = net(x, t, u)
    copy, sum_of_images = x, torch.zeros(3, 1, 1, 1)
    for level in net.encoder[1:]:
        copy = FIR()(copy)
        (before, features), (after, mixed) = seen[level.pyramid]
        assert features is seen[level.down][1] and before.shape[-1] == 2 * after.shape[-1]
        torch.testing.assert_close(after, copy)
        torch.testing.assert_close(mixed, features + level.pyramid.conv(copy))
    for level in net.decoder:
        larger = FIR(upward=True)(sum_of_images) if sum_of_images.shape[-1] > 1 else 0
        sum_of_images = level.image.conv(functional.silu(level.image.norm(seen[level.image][0][0]))) + larger
    torch.testing.assert_close(output, sum_of_images)


def test_resampling_is_the_filter_of_four_taps() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    taps = torch.tensor([1, 3, 3, 1], dtype=torch.float64) / 8
    down = torch.zeros(4, 8, dtype=torch.float64)
    for output in range(4):
        for tap in range(4):
            if 0 <= 2 * output + tap - 1 < 8:
                down[output, 2 * output + tap - 1] = taps[tap]
    torch.testing.assert_close(FIR().double()(x), down @ x @ down.T)
    small = x[:, :, :4, :4]
    torch.testing.assert_close(FIR(upward=True).double()(small), (2 * down.T) @ small @ (2 * down))
    # Inside the image, a constant stays a constant.
    assert torch.allclose(FIR()(torch.ones(1, 2, 8, 8))[..., 1:-1, 1:-1], torch.ones(()))
    assert torch.allclose(FIR(upward=True)(torch.ones(1, 2, 8, 8))[..., 1:-1, 1:-1], torch.ones(()))
