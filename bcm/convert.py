"""Weights of other code bases as weights of ours: every name and every shape is accounted for."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bcm.networks import ADMConfig, NCSNppConfig, NetworkConfig, build_network
from bcm.networks.layers import fir_filter
from bcm.types import BCMError

OFFICIAL = "official-imagenet64"
"""The paper's release for ImageNet-64, iCT and BCM, plain and deep; an ADM as in openai/consistency_models."""
EDM = "edm-ncsnpp"
"""EDM's SongUNet with Fourier embedding, residual or skip encoder, filter [1, 3, 3, 1] and channel_mult_noise 2."""
SOURCES = (OFFICIAL, EDM)
"""Where weights may come from."""
Tensors = Mapping[str, Tensor]
"""Tensors by name, such as a state dict."""

_NAMED = 5
"""How many names of a kind a message shows."""
_WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes that DDP, torch.compile and EDM's preconditioning put before every name."""
_UNUSED = {OFFICIAL: (), EDM: ("map_augment.weight",)}
"""Tensors without effect on plain images: EDM's augmentation labels are zero for those."""
_ADM_BLOCK = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "time": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
_ADM_ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
_PARTS = {"query": (0, 3), "key": (1, 3), "value": (2, 3)}
"""Of layers that are one in EDM, whose outputs lie there by turns: the turn, and how many there are."""
_EDM_BLOCK = {"norm0": "norm0", "conv0": "conv0", "time": "affine", "norm1": "norm1", "conv1": "conv1", "skip": "skip"}
_EDM_ATTENTION = {"norm": "norm2", "query": "qkv", "key": "qkv", "value": "qkv", "out": "proj"}


def convert(tensors: Tensors, source: str, network: NetworkConfig) -> dict[str, Tensor]:
    """Rename and reshape a foreign state dict to that of `build_network(network)`.

    Args:
        tensors: the foreign state dict; what wraps a network (DDP, torch.compile, EDM's preconditioning) may have put
            its prefix before every name.
        source: one of `SOURCES`.
        network: the shape of the network the weights belong to, see `infer_network`.

    Returns:
        Every tensor of our network by its name, float32, ready for `load_state_dict`. Only those that `unused` names
        are left out.

    Raises:
        BCMError: the source is unknown or has no such network; or tensors are missing, surplus, of another shape or
            of another constant value: one message counts them and names the first.
    """
    given = _given(tensors, source)
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in build_network(network).state_dict().items()}
    origins = _origins(source, network, list(wanted))
    constants = _constants(source, network)
    expected = {origins[name]: _shape_there(name, shape) for name, shape in wanted.items()}
    expected |= {name: tuple(value.shape) for name, value in constants.items()}
    _check(given, source, expected, constants)
    weights: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        part, parts = _PARTS.get(name.split(".")[-2], (0, 1))
        weights[name] = given[origins[name]].reshape(shape[0], parts, *shape[1:])[:, part].float().contiguous()
    return weights


def unused(tensors: Tensors, source: str) -> list[str]:
    """The names of the tensors that `convert` leaves out, for they have no effect on plain images."""
    return [name for name in _given(tensors, source) if name in _UNUSED[source]]


def _origins(source: str, network: NetworkConfig, wanted: Sequence[str]) -> dict[str, str]:
    """The foreign name of each of our tensors; a network that the source does not have is an error."""
    if source == OFFICIAL and isinstance(network, ADMConfig):
        modules = _adm_modules(network)
    elif source == EDM and isinstance(network, NCSNppConfig):
        if network.times != 1 or network.classes:
            raise BCMError(
                f"{source} has networks of one time without labels (EDM adds its labels at another place); "
                f"the network asked for has times={network.times}, classes={network.classes}"
            )
        modules = _edm_modules(network)
    else:
        raise BCMError(f"{source} has no network of the kind {type(network).__name__.removesuffix('Config')}")
    origins: dict[str, str] = {}
    for name in wanted:
        module, _, kind = name.rpartition(".")
        origins[name] = "map_noise.freqs" if kind == "frequencies" else f"{modules[module]}.{kind}"
    return origins


def _shape_there(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the foreign tensor for ours of this name: dense layers of attention are 1x1 convolutions there."""
    module = name.rpartition(".")[0]
    _, parts = _PARTS.get(module.rpartition(".")[2], (0, 1))
    dense = ".attention" in module and "norm" not in module and len(shape) == 2
    return (parts * shape[0], *shape[1:], *([1, 1] if dense else []))


def _adm_modules(config: ADMConfig) -> dict[str, str]:
    """Our modules and the official names; some exist in certain networks only."""
    names = {
        "embedding.dense0": "time_embed.0",
        "embedding.dense1": "time_embed.2",
        "embedding.end0": "time_embed_end.0",
        "embedding.end1": "time_embed_end.2",
        "embedding.project": "time_embed_align",
        "embedding.label": "label_emb",
        "first": "input_blocks.0.0",
        "last_norm": "out.0",
        "last": "out.2",
    }
    names |= _inside("middle.block0", "middle_block.0", _ADM_BLOCK)
    names |= _inside("middle.attention", "middle_block.1", _ADM_ATTENTION)
    names |= _inside("middle.block1", "middle_block.2", _ADM_BLOCK)
    levels, blocks = len(config.channels), config.blocks
    for level in range(levels):
        start = level * (blocks + 1)
        names |= _inside(f"encoder.{level}.down", f"input_blocks.{start}.0", _ADM_BLOCK)
        for index in range(blocks):
            names |= _inside(f"encoder.{level}.blocks.{index}", f"input_blocks.{start + index + 1}.0", _ADM_BLOCK)
            theirs = f"input_blocks.{start + index + 1}.1"
            names |= _inside(f"encoder.{level}.attention.{index}", theirs, _ADM_ATTENTION)
        for index in range(blocks + 1):
            names |= _inside(f"decoder.{level}.blocks.{index}", f"output_blocks.{start + index}.0", _ADM_BLOCK)
            names |= _inside(f"decoder.{level}.attention.{index}", f"output_blocks.{start + index}.1", _ADM_ATTENTION)
        # There, a level ends with the block that doubles the image; here, the next level starts with it.
        attends = config.resolutions[levels - level] in config.attention if level else False
        names |= _inside(f"decoder.{level}.up", f"output_blocks.{start - 1}.{2 if attends else 1}", _ADM_BLOCK)
    return names


def _edm_modules(config: NCSNppConfig) -> dict[str, str]:
    """Our modules and EDM's names; some exist in certain networks only."""
    sizes = config.resolutions
    names = {
        "embedding.dense0": "map_layer0",
        "embedding.dense1": "map_layer1",
        "first": f"enc.{sizes[0]}x{sizes[0]}_conv",
    }
    lowest = f"dec.{sizes[-1]}x{sizes[-1]}"
    names |= _inside("middle.block0", f"{lowest}_in0", _EDM_BLOCK)
    names |= _inside("middle.attention", f"{lowest}_in0", _EDM_ATTENTION)
    names |= _inside("middle.block1", f"{lowest}_in1", _EDM_BLOCK)
    mix = "aux_residual" if config.progressive_input == "residual" else "aux_skip"
    for level, size in enumerate(sizes):
        theirs = f"enc.{size}x{size}"
        names |= _inside(f"encoder.{level}.down", f"{theirs}_down", _EDM_BLOCK)
        names[f"encoder.{level}.pyramid.conv"] = f"{theirs}_{mix}"
        for index in range(config.blocks):
            names |= _inside(f"encoder.{level}.blocks.{index}", f"{theirs}_block{index}", _EDM_BLOCK)
            names |= _inside(f"encoder.{level}.attention.{index}", f"{theirs}_block{index}", _EDM_ATTENTION)
    for level, size in enumerate(reversed(sizes)):
        theirs = f"dec.{size}x{size}"
        names |= _inside(f"decoder.{level}.up", f"{theirs}_up", _EDM_BLOCK)
        for index in range(config.blocks + 1):
            names |= _inside(f"decoder.{level}.blocks.{index}", f"{theirs}_block{index}", _EDM_BLOCK)
        names |= _inside(f"decoder.{level}.attention", f"{theirs}_block{config.blocks}", _EDM_ATTENTION)
        names |= {f"decoder.{level}.image.{kind}": f"{theirs}_aux_{kind}" for kind in ("norm", "conv")}
    return names


def _inside(ours: str, theirs: str, layers: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{our}": f"{theirs}.{their}" for our, their in layers.items()}


def _constants(source: str, network: NetworkConfig) -> dict[str, Tensor]:
    """The tensors that are no weights: EDM saves its smoothing filter with every layer that resamples."""
    if source != EDM or not isinstance(network, NCSNppConfig):
        return {}
    mix = "aux_residual" if network.progressive_input == "residual" else "aux_down"
    upper, lower = network.resolutions[:-1], network.resolutions[1:]
    layers = [f"enc.{size}x{size}_{layer}" for size in lower for layer in ("down.conv0", "down.skip", mix)]
    layers += [f"dec.{size}x{size}_up.{layer}" for size in upper for layer in ("conv0", "skip")]
    if network.progressive == "output_skip":
        layers += [f"dec.{size}x{size}_aux_up" for size in upper]
    return {f"{layer}.resample_filter": fir_filter() for layer in layers}


def _given(tensors: Tensors, source: str) -> dict[str, Tensor]:
    """The tensors of a known source, without the prefixes that every name has."""
    if source not in SOURCES:
        raise BCMError(f"the source {source!r} is unknown; known are {', '.join(SOURCES)}")
    names = dict(tensors)
    while prefix := next((p for p in _WRAPPERS if names and all(name.startswith(p) for name in names)), ""):
        names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    return names


def _check(given: Tensors, source: str, expected: Mapping[str, tuple[int, ...]], constants: Tensors) -> None:
    """Raise one `BCMError` for all that does not fit."""
    missing = sorted(expected.keys() - given.keys())
    surplus = sorted(given.keys() - expected.keys() - set(_UNUSED[source]))
    common = sorted(expected.keys() & given.keys())
    shapes = {name: tuple(given[name].shape) for name in common}
    misshapen = [f"{name} {shapes[name]}, not {expected[name]}" for name in common if shapes[name] != expected[name]]
    changed = [
        name
        for name, value in constants.items()
        if shapes.get(name) == tuple(value.shape)
        and not (given[name].is_meta or torch.allclose(given[name].float().cpu(), value))
    ]
    kinds = {"missing": missing, "surplus": surplus, "of another shape": misshapen, "of another value": changed}
    wrong = [
        f"{len(names)} {kind} ({', '.join(names[:_NAMED])}{', ...' * (len(names) > _NAMED)})"
        for kind, names in kinds.items()
        if names
    ]
    if wrong:
        raise BCMError(
            f"the tensors are not those of this network as {source} has it: {'; '.join(wrong)}. "
            "Give the network options the weights were trained with."
        )


def infer_network(tensors: Tensors, source: str, resolution: int | None = None) -> NetworkConfig:
    """Read the shape of the network off the names and shapes of a foreign state dict.

    What they cannot tell is left at the defaults of `ADMConfig` or `NCSNppConfig`: dropout; for an ADM also the size
    and normalisation of the attention heads.

    Args:
        tensors: the foreign state dict.
        source: one of `SOURCES`.
        resolution: of the images, where the tensors do not say (ADM); None means the default of `ADMConfig`.

    Raises:
        BCMError: the source is unknown, or the tensors are not those of such a network.
    """
    given = _given(tensors, source)
    try:
        return _infer_adm(given, resolution) if source == OFFICIAL else _infer_edm(given)
    except (KeyError, IndexError) as error:
        raise BCMError(f"the tensors are not those of a network as {source} has it: {error} is not there") from error


def _infer_adm(tensors: Tensors, resolution: int | None) -> ADMConfig:
    full = ADMConfig().resolution if resolution is None else resolution
    image_channels = tensors["input_blocks.0.0.weight"].shape[1]
    width = tensors["time_embed.0.weight"].shape[1]
    # Only blocks that double the image come second or third; every level but one ends with such a block.
    ups = [name for name in tensors if re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", name)]
    levels = len(ups) + 1
    blocks = len({name.split(".")[1] for name in tensors if name.startswith("output_blocks.")}) // levels - 1
    ends = [f"input_blocks.{level * (blocks + 1) + blocks}" for level in range(levels)]
    channels = [tensors[f"{end}.0.out_layers.3.weight"].shape[0] for end in ends]
    return ADMConfig(
        image_channels=image_channels,
        resolution=full,
        width=width,
        channel_mult=tuple(count // width for count in channels),
        blocks=blocks,
        attention=tuple(full >> level for level, end in enumerate(ends) if f"{end}.1.qkv.weight" in tensors),
        times=2 if "time_embed_align.weight" in tensors else 1,
        classes=tensors["label_emb.weight"].shape[0] if "label_emb.weight" in tensors else 0,
    )


def _infer_edm(tensors: Tensors) -> NCSNppConfig:
    matches = [re.match(r"enc\.(\d+)x\1_", name) for name in tensors]
    sizes = sorted({int(match[1]) for match in matches if match}, reverse=True)
    encoder, lowest = [f"enc.{size}x{size}" for size in sizes], f"dec.{sizes[-1]}x{sizes[-1]}"
    width, image_channels = tensors[f"{encoder[0]}_conv.weight"].shape[:2]
    channels = [tensors[f"{level}_block0.conv0.weight"].shape[0] for level in encoder]
    return NCSNppConfig(
        image_channels=image_channels,
        resolution=sizes[0],
        width=width,
        channel_mult=tuple(count // width for count in channels),
        blocks=sum(re.fullmatch(rf"{encoder[0]}_block\d+\.norm0\.weight", name) is not None for name in tensors),
        attention=tuple(size for size in sizes if f"enc.{size}x{size}_block0.qkv.weight" in tensors),
        times=1,
        progressive="output_skip" if len(sizes) > 1 and f"{lowest}_aux_conv.weight" in tensors else "none",
        progressive_input="input_skip" if any("aux_skip" in name for name in tensors) else "residual",
    )
