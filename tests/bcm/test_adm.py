"""ADM: sizes, initialisation, attention, dropout, labels, times. Its values are checked in test_convert.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bcm.networks import ADM, ADMConfig
from bcm.networks.adm import Attention, GroupNorm, residual_block
from bcm.networks.embeddings import positional
from bcm.rng import Dropout
from bcm.types import BCMError


def tiny(**changes: Any) -> ADMConfig:
    values: dict[str, Any] = dict(
        image_channels=1,
        resolution=8,
        width=32,
        channel_mult=(1, 2),
        blocks=1,
        attention=(4,),
        head_channels=16,
        dropout=0.0,
        classes=0,
    )
    return ADMConfig(**{**values, **changes})


def batch(config: ADMConfig, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, config.image_channels, config.resolution, config.resolution, generator=generator)
    t = torch.linspace(0.1, 80, rows, dtype=torch.float64)
    return x, t, t.flip(0) + 1


def awake(net: ADM) -> ADM:
    """Give every weight a size that matters: at initialisation the zero layers hide most of the network."""
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return net


@pytest.mark.parametrize(
    ("config", "count"),
    [(ADMConfig(times=1), 278_023_107), (ADMConfig(), 279_941_571)],
)
def test_has_the_published_number_of_parameters(config: ADMConfig, count: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in ADM(config).parameters()) == count


@pytest.mark.parametrize(("times", "millions"), [(1, 465.1), (2, 467.0)])
def test_the_deep_form_has_the_published_number_of_parameters(times: int, millions: float) -> None:
    with torch.device("meta"):
        net = ADM(ADMConfig(times=times, blocks=6))
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny(times=1),
        tiny(classes=10),
        tiny(channel_mult=(2, 1, 1), blocks=2, attention=(), image_channels=3),
        tiny(attention_norm="none", attention=(8, 4), head_channels=32),
    ],
)
def test_output_has_the_shape_of_the_images_and_starts_at_zero(config: ADMConfig) -> None:
    net = ADM(config)
    x, t, u = batch(config)
    label = torch.tensor([0, 3, 9]) if config.classes else None
    output = net(x, t, u, label)
    assert output.shape == x.shape and output.dtype == x.dtype
    assert not output.any()
    awake(net)(x, t, u, label).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def test_initial_weights() -> None:
    torch.manual_seed(0)
    net = ADM(tiny(width=64, classes=200))
    zero = {"conv1", "out", "last"}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if name.rpartition(".")[2] in zero:
                assert not any(parameter.any() for parameter in module.parameters()), name
            elif name != "embedding.project":
                # torch's default: uniform of variance 1 / (3 fan in).
                bound = 1 / math.sqrt(module.weight[0].numel())
                assert float(module.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1), name
                assert float(module.weight.detach().abs().max()) <= bound
    project = net.embedding.project
    assert project is not None and project.bias is None
    assert torch.equal(project.weight.detach(), torch.cat((torch.eye(256), torch.zeros(256, 256)), dim=1))


def test_dropout_acts_at_small_images_only() -> None:
    net = ADM(tiny(channel_mult=(1, 1, 1), resolution=16, dropout=0.3, dropout_resolution=8))
    sizes: dict[int, set[float]] = {}

    def note(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        sizes.setdefault(output.shape[-1], set()).add(layer.p)

    for layer in net.modules():
        if isinstance(layer, Dropout):
            layer.register_forward_hook(note)
    x, t, u = batch(net.config)
    net(x, t, u)
    assert sizes == {16: {0.0}, 8: {0.3}, 4: {0.3}}


@pytest.mark.parametrize("norm", ["qkv", "none"])
def test_attention_agrees_with_a_slow_reference(norm: str) -> None:
    torch.manual_seed(0)
    block = Attention(64, head_channels=16, norm=norm).double()
    nn.init.normal_(block.out.weight)
    x = torch.randn(2, 64, 3, 3, dtype=torch.float64)
    qkv = block.qkv(block.norm(x).flatten(2).transpose(1, 2))
    expected = torch.zeros(2, 9, 64, dtype=torch.float64)
    for head in range(4):
        of_head = slice(16 * head, 16 * head + 16)
        q, k, v = (qkv[..., 64 * part : 64 * (part + 1)][..., of_head] for part in range(3))
        if norm == "qkv":
            q, k, v = (y / (y.square().mean(-1, keepdim=True).sqrt() + 1e-4) for y in (q, k, v))
        expected[..., of_head] = torch.softmax(q @ k.transpose(1, 2) / 4, dim=-1) @ v
    expected = x + block.out(expected).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(block(x), expected)


def test_a_zero_query_has_a_finite_gradient() -> None:
    block = Attention(32, head_channels=16, norm="qkv")
    nn.init.zeros_(block.qkv.weight)
    nn.init.zeros_(block.qkv.bias)
    nn.init.normal_(block.out.weight)
    block(torch.randn(1, 32, 2, 2)).sum().backward()
    assert block.qkv.weight.grad is not None and block.qkv.weight.grad.isfinite().all()


def test_normalisation_runs_in_float32_even_under_autocast() -> None:
    x = torch.randn(2, 64, 4, 4).mul_(0.1).add_(30).bfloat16()
    norm = GroupNorm(64)
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, norm(x.float()).bfloat16())
    assert norm.num_groups == 32 and norm.eps == 1e-5


def test_bfloat16_autocast_is_near_float32() -> None:
    net = ADM(tiny())
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    x, t, u = batch(net.config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = net(x, t, u).float()
    exact = net(x, t, u).detach()
    assert float((half - exact).square().mean() / exact.square().mean()) < 1e-3


def test_the_block_adds_the_time_and_its_input() -> None:
    block = residual_block(tiny(), 8, 32, 32)
    x, embedding = torch.randn(2, 32, 8, 8), torch.randn(2, 128)
    assert torch.equal(block(x, embedding), x)
    nn.init.dirac_(block.conv1.get_parameter("weight"))
    h = block.conv0(torch.nn.functional.silu(block.norm0(x))) + block.time(embedding)[:, :, None, None]
    torch.testing.assert_close(block(x, embedding), x + torch.nn.functional.silu(block.norm1(h)))


def test_features_are_cosines_and_sines_of_the_logarithm_of_the_time() -> None:
    t = torch.tensor([0.002, 1.3, 79.9], dtype=torch.float64)
    frequencies = [10_000 ** (-k / 4) for k in range(4)]
    angles = torch.tensor([[1000 * 0.25 * math.log(time) * w for w in frequencies] for time in t.tolist()])
    torch.testing.assert_close(positional(t, 8), torch.cat((angles.cos(), angles.sin()), 1), rtol=0, atol=3e-4)


def test_times_and_labels_matter_and_labels_are_checked() -> None:
    net = awake(ADM(tiny(classes=4)))
    x, t, u = batch(net.config)
    label = torch.tensor([0, 3, 1])
    output = net(x, t, u, label).detach()
    for other in (net(x, t / 2, u, label), net(x, t, u / 2, label), net(x, u, t, label)):
        assert float((other.detach() - output).abs().max()) > 1e-3
    change = (net(x, t, u, torch.tensor([0, 2, 1])) - output).abs().amax(dim=(1, 2, 3))
    assert change[0] == change[2] == 0 and change[1] > 1e-3
    with pytest.raises(BCMError, match="has 4 classes and needs a label"):
        net(x, t, u)
    with pytest.raises(BCMError, match="labels span 0 to 4"):
        net(x, t, u, torch.tensor([0, 4, 1]))
    with pytest.raises(BCMError, match=r"built for images of \(1, 8, 8\)"):
        net(torch.zeros(3, 1, 16, 16), t, u, label)


def test_images_of_a_batch_do_not_mix() -> None:
    net = awake(ADM(tiny())).eval()
    x, t, u = batch(net.config, rows=4)
    whole = net(x, t, u)
    for row in range(4):
        one = slice(row, row + 1)
        torch.testing.assert_close(net(x[one], t[one], u[one]), whole[one], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 48}, "width is 48; group normalisation needs a multiple of 32"),
        ({"head_channels": 48}, "head_channels is 48; it must divide the 64 channels"),
        ({"head_channels": 0}, "head_channels is 0"),
        ({"head_channels": 64, "attention": (8,)}, "head_channels is 64; it must divide the 32 channels"),
        ({"attention_norm": "qk"}, "attention_norm is 'qk'; known are qkv, none"),
        ({"dropout_resolution": -1}, "dropout_resolution is -1"),
        ({"attention": (16,)}, r"attention at \[16\]"),
        ({"times": 0}, "times is 0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"resolution": 9}, "cannot be halved 1 times"),
    ],
)
def test_impossible_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BCMError, match=message):
        tiny(**change)
