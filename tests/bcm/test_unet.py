"""What holds for every kind of network: their descriptions, the fine-tuning form, activation checkpointing."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bcm import strict
from bcm.networks import (
    ADM,
    ADMConfig,
    NCSNpp,
    NCSNppConfig,
    NetworkConfig,
    build_network,
)
from bcm.networks.unet import Block
from bcm.rng import shared_dropout
from bcm.types import BCMError

NCSNPP = NCSNppConfig(
    resolution=8, width=8, channel_mult=(1, 2), blocks=1, attention=(4,), fourier_scale=1.0, embedding="projected"
)
SHAPE: Any = NetworkConfig
NETWORKS = [
    NCSNPP,
    replace(NCSNPP, progressive="output_skip", progressive_input="input_skip", classes=3),
    ADMConfig(resolution=8, width=32, channel_mult=(1, 2), blocks=1, attention=(4,), head_channels=16, classes=3),
]
names = pytest.mark.parametrize("network", NETWORKS, ids=["ncsnpp", "lsun", "adm"])


def awake(network: NetworkConfig) -> NCSNpp | ADM:
    net = build_network(network)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return net


def batch(network: NetworkConfig) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 1.0, 10.0, 80.0], dtype=torch.float64)
    return x, t, t.flip(0), torch.tensor([0, 1, 2, 0]) if network.classes else None


@names
def test_a_network_is_described_in_full_by_its_json(network: NetworkConfig) -> None:
    entry = strict.dump(network)
    assert entry["kind"] in ("ncsnpp", "adm")
    assert strict.read(SHAPE, json.dumps(entry), "network", complete=True) == network
    with pytest.raises(BCMError, match="'dit' found using 'kind' does not match any of the expected tags: 'ncsnpp'"):
        strict.read(SHAPE, json.dumps({**entry, "kind": "dit"}), "network")
    with pytest.raises(BCMError, match="unknown key 'widht'; did you mean 'width'"):
        strict.read(SHAPE, json.dumps({**entry, "widht": 3}), "network")


@names
def test_two_projected_times_start_as_the_network_of_one_time(network: NetworkConfig) -> None:
    net, one = build_network(network).eval(), awake(replace(network, times=1)).eval()
    absent = net.load_state_dict(one.state_dict(), strict=False)
    assert not absent.unexpected_keys
    assert {name.split(".")[1] for name in absent.missing_keys} == {"end0", "end1", "project"}
    x, t, u, label = batch(network)
    with torch.no_grad():
        expected = one(x, t, t, label)
        assert float(expected.abs().max()) > 0.01
        torch.testing.assert_close(net(x, t, u, label), expected)
        assert torch.equal(net(x, t, u, label), net(x, t, u / 3, label))
        assert net.embedding.project is not None
        torch.nn.init.normal_(net.embedding.project.weight)
        assert float((net(x, t, u, label) - net(x, t, u / 3, label)).abs().max()) > 1e-3


def gradients(net: NCSNpp | ADM, *, shared: bool, inside: bool = True, seed: int = 3) -> list[Tensor]:
    net.zero_grad()
    torch.manual_seed(seed)
    inputs = batch(net.config)
    if shared:
        with shared_dropout(net, seed=seed, rows=2):
            loss = net(*inputs).square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    else:
        net(*inputs).square().mean().backward()
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


def recompute(net: nn.Module, on: bool) -> None:
    for block in net.modules():
        if isinstance(block, Block):
            block.recompute = on


@names
@pytest.mark.parametrize(("shared", "inside"), [(True, True), (True, False), (False, True)])
def test_checkpointing_changes_neither_masks_nor_gradients(network: NetworkConfig, shared: bool, inside: bool) -> None:
    net = awake(network)
    plain = gradients(net, shared=shared)
    recompute(net, True)
    again = gradients(net, shared=shared, inside=inside)
    assert len(again) == len(list(net.parameters()))
    torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-9)
    other = gradients(net, shared=shared, seed=4)
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(other, plain, strict=True))


@names
def test_checkpointing_keeps_less_and_can_be_taken_back(network: NetworkConfig) -> None:
    net = awake(network)

    def kept() -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Any:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), shared_dropout(net, 3, 4):
            output = net(*batch(network))
        for parameter in net.parameters():
            sizes.pop(parameter.untyped_storage().data_ptr(), None)
        assert output.requires_grad
        return sum(sizes.values())

    plain = kept()
    recompute(net, True)
    assert kept() < plain / 2
    recompute(net, False)
    assert kept() == plain
