"""Foreign weights: published networks are reproduced, and every name and shape is accounted for."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bcm.convert import EDM, OFFICIAL, convert, infer_network, unused
from bcm.networks import ADMConfig, NCSNppConfig, NetworkConfig, build_network
from bcm.types import BCMError

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"{GOLDEN} is absent")

TINY_ADM = ADMConfig(resolution=8, width=32, channel_mult=(1, 2), blocks=1, attention=(4,), classes=10)
TINY_NCSNPP = NCSNppConfig(resolution=8, width=8, channel_mult=(1, 2), blocks=2, attention=(4,), times=1)
LSUN = NCSNppConfig(
    resolution=256,
    channel_mult=(1, 1, 2, 2, 2, 2, 2),
    blocks=2,
    times=1,
    progressive="output_skip",
    progressive_input="input_skip",
)


def layer(name: str, *shape: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def official_shapes(config: ADMConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of the official network, counted block by block as its constructor makes them."""
    emb = 4 * config.width

    def block(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {
            **layer(f"{name}.in_layers.0", inputs),
            **layer(f"{name}.in_layers.2", outputs, inputs, 3, 3),
            **layer(f"{name}.emb_layers.1", outputs, emb),
            **layer(f"{name}.out_layers.0", outputs),
            **layer(f"{name}.out_layers.3", outputs, outputs, 3, 3),
            **(layer(f"{name}.skip_connection", outputs, inputs, 1, 1) if inputs != outputs else {}),
        }

    def attention(name: str, c: int) -> dict[str, tuple[int, ...]]:
        return layer(f"{name}.norm", c) | layer(f"{name}.qkv", 3 * c, c, 1, 1) | layer(f"{name}.proj_out", c, c, 1, 1)

    shapes = layer("time_embed.0", emb, config.width) | layer("time_embed.2", emb, emb)
    if config.times == 2:
        shapes |= layer("time_embed_end.0", emb, config.width) | layer("time_embed_end.2", emb, emb)
        shapes |= layer("time_embed_align", emb, 2 * emb, bias=False)
    shapes |= layer("label_emb", config.classes, emb, bias=False)
    h = config.channels[0]
    shapes |= layer("input_blocks.0.0", h, config.image_channels, 3, 3)
    skips, last = [h], len(config.channels) - 1
    for level, (size, outputs) in enumerate(zip(config.resolutions, config.channels, strict=True)):
        for _ in range(config.blocks):
            name = f"input_blocks.{len(skips)}"
            shapes |= block(f"{name}.0", h, outputs) | (
                attention(f"{name}.1", outputs) if size in config.attention else {}
            )
            h = outputs
            skips.append(h)
        if level < last:
            shapes |= block(f"input_blocks.{len(skips)}.0", h, h)
            skips.append(h)
    shapes |= block("middle_block.0", h, h) | attention("middle_block.1", h) | block("middle_block.2", h, h)
    place = 0
    for level in range(last, -1, -1):
        for index in range(config.blocks + 1):
            outputs, attends = config.channels[level], config.resolutions[level] in config.attention
            shapes |= block(f"output_blocks.{place}.0", h + skips.pop(), outputs)
            shapes |= attention(f"output_blocks.{place}.1", outputs) if attends else {}
            if level and index == config.blocks:
                shapes |= block(f"output_blocks.{place}.{1 + attends}", outputs, outputs)
            h, place = outputs, place + 1
    return shapes | layer("out.0", h) | layer("out.2", config.image_channels, h, 3, 3)


def edm_shapes(config: NCSNppConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of EDM's network, counted block by block as its constructor makes them."""
    emb, images, residual = 4 * config.width, config.image_channels, config.progressive_input == "residual"
    fir = {"resample_filter": (1, 1, 4, 4)}

    def block(name: str, inputs: int, outputs: int, *, resample: bool = False, attend: bool = False) -> None:
        shapes.update(layer(f"{name}.norm0", inputs) | layer(f"{name}.conv0", outputs, inputs, 3, 3))
        shapes.update(layer(f"{name}.affine", outputs, emb) | layer(f"{name}.norm1", outputs))
        shapes.update(layer(f"{name}.conv1", outputs, outputs, 3, 3))
        if inputs != outputs or resample:
            shapes.update(layer(f"{name}.skip", outputs, inputs, 1, 1))
        if resample:
            shapes.update({f"{name}.{part}.{key}": shape for part in ("conv0", "skip") for key, shape in fir.items()})
        if attend:
            shapes.update(layer(f"{name}.norm2", outputs) | layer(f"{name}.qkv", 3 * outputs, outputs, 1, 1))
            shapes.update(layer(f"{name}.proj", outputs, outputs, 1, 1))

    shapes: dict[str, tuple[int, ...]] = {"map_noise.freqs": (config.width,)}
    shapes |= layer("map_layer0", emb, 2 * config.width) | layer("map_layer1", emb, emb)
    h = config.width
    shapes |= layer(f"enc.{config.resolution}x{config.resolution}_conv", h, images, 3, 3)
    skips, pyramid, last = [h], images, len(config.channels) - 1
    for level, (size, outputs) in enumerate(zip(config.resolutions, config.channels, strict=True)):
        if level:
            block(f"enc.{size}x{size}_down", h, h, resample=True)
            mix = f"enc.{size}x{size}_aux"
            shapes |= layer(f"{mix}_residual", h, pyramid, 3, 3) if residual else layer(f"{mix}_skip", h, images, 1, 1)
            shapes[f"{mix}_{'residual' if residual else 'down'}.resample_filter"] = (1, 1, 4, 4)
            pyramid = h
            skips.append(h)
        for index in range(config.blocks):
            block(f"enc.{size}x{size}_block{index}", h, outputs, attend=size in config.attention)
            h = outputs
            skips.append(h)
    for level in range(last, -1, -1):
        size, outputs = config.resolutions[level], config.channels[level]
        name = f"dec.{size}x{size}"
        if level == last:
            block(f"{name}_in0", h, h, attend=True)
            block(f"{name}_in1", h, h)
        else:
            block(f"{name}_up", h, h, resample=True)
        for index in range(config.blocks + 1):
            block(
                f"{name}_block{index}",
                h + skips.pop(),
                outputs,
                attend=index == config.blocks and size in config.attention,
            )
            h = outputs
        if level == 0 or config.progressive == "output_skip":
            shapes |= (
                {f"{name}_aux_up.resample_filter": (1, 1, 4, 4)}
                if level < last and last and config.progressive != "none"
                else {}
            )
            shapes |= layer(f"{name}_aux_norm", h) | layer(f"{name}_aux_conv", images, h, 3, 3)
    return shapes


def foreign(network: NetworkConfig, device: str = "cpu") -> dict[str, Tensor]:
    """Weights of the foreign network of this shape; its filters have their true values."""
    shapes = official_shapes(network) if isinstance(network, ADMConfig) else edm_shapes(network)
    generator = None if device == "meta" else torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    filters = {name: taps[:, None] * taps[None] for name in tensors if name.endswith("resample_filter")}
    return tensors | {name: value[None, None].to(device) for name, value in filters.items()}


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a published implementation, and its inputs and output."""
    arrays = np.load(GOLDEN / f"{name}.npz")
    tensors = {key: torch.from_numpy(arrays[key]) for key in arrays}
    weights = {key.removeprefix("param/"): value for key, value in tensors.items() if key.startswith("param/")}
    return weights, tensors


@needs_golden
@pytest.mark.parametrize(
    ("name", "source", "changes"),
    [
        ("ncsnpp_tiny", EDM, {"dropout": 0.0}),
        ("adm_ict_tiny", OFFICIAL, {"head_channels": 16}),
        ("adm_bcm_tiny", OFFICIAL, {"head_channels": 16}),
    ],
)
def test_reproduces_the_published_network(name: str, source: str, changes: dict[str, Any]) -> None:
    weights, data = golden(name)
    network = replace(infer_network(weights, source, resolution=16), **changes)
    net = build_network(network).eval()
    net.load_state_dict(convert(weights, source, network))
    t, u = data["t"].double(), data.get("u", data["t"]).double()
    with torch.no_grad():
        output = net(data["x"], t, u, data.get("y"))
    torch.testing.assert_close(output, data["F"], rtol=0, atol=1e-5)


@needs_golden
@pytest.mark.parametrize(("kind", "times", "count"), [("ict", 1, 278_023_107), ("bcm", 2, 279_941_571)])
def test_the_full_network_has_the_published_names_and_shapes(kind: str, times: int, count: int) -> None:
    shapes = json.loads((GOLDEN / f"adm_{kind}_imagenet64_shapes.json").read_text())
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert infer_network(tensors, OFFICIAL) == ADMConfig(times=times)
    converted = convert(tensors, OFFICIAL, ADMConfig(times=times))
    assert sum(tensor.numel() for tensor in converted.values()) == sum(map(math.prod, shapes.values())) == count
    with torch.device("meta"):
        net = build_network(ADMConfig(times=times))
    net.load_state_dict(converted, assign=True)
    assert {name: list(shape) for name, shape in official_shapes(ADMConfig(times=times)).items()} == shapes


@needs_golden
def test_edms_shapes_are_counted_right() -> None:
    weights, _ = golden("ncsnpp_tiny")
    network = NCSNppConfig(resolution=16, width=32, blocks=1, attention=(8,), times=1)
    assert edm_shapes(network) == {name: tuple(tensor.shape) for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("network", "source"),
    [
        (ADMConfig(times=1, blocks=6), OFFICIAL),
        (ADMConfig(blocks=6), OFFICIAL),
        (ADMConfig(times=1, attention=(32, 16, 8)), OFFICIAL),
        (TINY_ADM, OFFICIAL),
        (NCSNppConfig(times=1), EDM),
        (NCSNppConfig(times=1, blocks=8), EDM),
        (LSUN, EDM),
        (replace(TINY_NCSNPP, progressive="output_skip"), EDM),
        (replace(TINY_NCSNPP, progressive_input="input_skip"), EDM),
    ],
)
def test_the_shape_of_every_network_is_read_off_its_weights(network: NetworkConfig, source: str) -> None:
    tensors = foreign(network, "meta")
    assert infer_network(tensors, source, network.resolution) == network
    with torch.device("meta"):
        net = build_network(network)
    net.load_state_dict(convert(tensors, source, network), assign=True)


@pytest.mark.parametrize(("network", "source"), [(TINY_ADM, OFFICIAL), (TINY_NCSNPP, EDM)])
def test_wrappers_are_seen_through_and_weights_become_float32(network: NetworkConfig, source: str) -> None:
    tensors = foreign(network)
    expected = convert(tensors, source, network)
    assert sum(tensor.numel() for tensor in expected.values()) == sum(
        tensor.numel() for name, tensor in tensors.items() if "resample_filter" not in name
    )
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in convert(wrapped, source, network).items())
    half = convert({name: tensor.half() for name, tensor in tensors.items()}, source, network)
    assert all(tensor.dtype == torch.float32 for tensor in half.values())


@pytest.mark.parametrize(("network", "source"), [(TINY_ADM, OFFICIAL), (TINY_NCSNPP, EDM)])
def test_one_message_names_all_that_does_not_fit(network: NetworkConfig, source: str) -> None:
    tensors = foreign(network)
    first, second, third, *rest = [name for name in tensors if "filter" not in name]
    del tensors[first]
    tensors[second] = tensors[second][:-1]
    tensors["noise"] = torch.zeros(1)
    with pytest.raises(BCMError) as error:
        convert(tensors, source, network)
    message = str(error.value)
    shape = tuple(tensors[second].shape)
    assert f"1 missing ({first})" in message and "1 surplus (noise)" in message
    assert f"1 of another shape ({second} {shape}, not {(shape[0] + 1, *shape[1:])})" in message
    assert third not in message
    for name in rest:
        del tensors[name]
    with pytest.raises(BCMError, match=rf"{len(rest) + 1} missing \(([^,)]+, ){{5}}\.\.\.\)"):
        convert(tensors, source, network)


def test_another_filter_is_refused() -> None:
    tensors = foreign(TINY_NCSNPP)
    tensors["enc.4x4_down.conv0.resample_filter"] = torch.full((1, 1, 4, 4), 1 / 16)
    with pytest.raises(BCMError, match=r"1 of another value \(enc.4x4_down.conv0.resample_filter\)"):
        convert(tensors, EDM, TINY_NCSNPP)


def test_what_is_left_out_is_named() -> None:
    tensors = {f"model.{name}": value for name, value in foreign(TINY_NCSNPP).items()}
    assert unused(tensors, EDM) == []
    tensors["model.map_augment.weight"] = torch.zeros(16, 9)
    assert unused(tensors, EDM) == ["map_augment.weight"]
    assert convert(tensors, EDM, TINY_NCSNPP).keys() == build_network(TINY_NCSNPP).state_dict().keys()


@pytest.mark.parametrize(
    ("source", "network", "message"),
    [
        ("edm", TINY_NCSNPP, "the source 'edm' is unknown; known are official-imagenet64, edm-ncsnpp"),
        (EDM, TINY_ADM, "edm-ncsnpp has no network of the kind ADM"),
        (OFFICIAL, TINY_NCSNPP, "official-imagenet64 has no network of the kind NCSNpp"),
        (EDM, replace(TINY_NCSNPP, times=2), "times=2, classes=0"),
        (EDM, replace(TINY_NCSNPP, classes=10), "times=1, classes=10"),
    ],
)
def test_a_source_without_such_a_network_is_refused(source: str, network: NetworkConfig, message: str) -> None:
    with pytest.raises(BCMError, match=message):
        convert(foreign(TINY_NCSNPP), source, network)


@pytest.mark.parametrize("source", [OFFICIAL, EDM])
def test_tensors_of_another_kind_of_network_are_refused(source: str) -> None:
    with pytest.raises(BCMError, match=f"not those of a network as {source} has it"):
        infer_network({"conv1.weight": torch.zeros(64, 3, 7, 7)}, source)
