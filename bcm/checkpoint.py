"""Checkpoints: a directory of safetensors and JSON, never pickle.

`checkpoint.json` is written last and names every other file with its SHA-256, so a directory that was not finished
or was changed is never taken for a checkpoint.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from bcm.networks import NetworkConfig, build_network, network_from_dict, network_to_dict
from bcm.precond import BCM
from bcm.training import TrainState
from bcm.types import BCMError

FORMAT = {"format": "bcm-checkpoint", "version": 1}
INDEX = "checkpoint.json"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself."""

    k: int
    """Training iterations done."""
    network: NetworkConfig
    sigma_data: float
    skipped: tuple[int, int]
    """Steps skipped for non-finite gradients: in all, and in a row now."""
    ema_rates: tuple[float, ...]
    """mu_EMA of each average, the serving one first; empty where that was not noted."""
    extra: dict[str, Any]
    """Whatever the writer noted: config, dataset, code version. JSON only."""


def save_checkpoint(
    directory: Path, state: TrainState, network: NetworkConfig, extra: Mapping[str, Any] | None = None
) -> None:
    """Write weights, averages, optimizer and progress of `state`; `network` rebuilds the architecture."""
    optimizer = {
        f"{index}.{name}": value.contiguous()
        for index, entry in state.optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    averages = {_average_file(i): _tensors(average.model) for i, average in enumerate(state.averages)}
    tensors = {"model": _tensors(state.model), **averages, "optimizer": optimizer}
    progress = {"k": state.k, "skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
    progress |= {"ema_rates": [average.rate for average in state.averages]}
    _write(directory, tensors, {**_describe(state.model, network), **progress, "extra": dict(extra or {})})


def load_checkpoint(directory: Path, state: TrainState, network: NetworkConfig) -> CheckpointInfo:
    """Continue from `directory`, bit for bit; another architecture or other EMA rates are an error."""
    index = _read_index(directory)
    info = _info(directory, index)
    _check_architecture(directory, info.network, network)
    _check_rates(directory, info.ema_rates, tuple(average.rate for average in state.averages))
    _load_weights(directory, index, "model", state.model)
    for i, average in enumerate(state.averages):
        _load_weights(directory, index, _average_file(i), average.model)
    flat = _read(directory, index, "optimizer")
    moments: dict[int, dict[str, Tensor]] = {}
    parameters = list(state.model.parameters())
    for name, value in flat.items():
        position, key = name.split(".", 1)
        moments.setdefault(int(position), {})[key] = _laid_out(value, parameters[int(position)])
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    state.k = info.k
    state.skipped, state.skipped_in_a_row = info.skipped
    return info


def save_model(directory: Path, model: BCM, network: NetworkConfig, k: int, extra: Mapping[str, Any]) -> None:
    """Write a model for inference alone: its weights stand as the average."""
    _write(directory, {"ema": _tensors(model)}, {**_describe(model, network), "k": k, "extra": dict(extra)})


def load_model(
    directory: Path, device: torch.device | str = "cpu", ema_rate: float | None = None
) -> tuple[BCM, CheckpointInfo]:
    """The model to use for inference (EMA weights, eval mode), and what its checkpoint says.

    `ema_rate` chooses one of several averages; without it, the one that serves.
    """
    index = _read_index(directory)
    info = _info(directory, index)
    if ema_rate is not None and ema_rate not in info.ema_rates:
        raise BCMError(f"checkpoint {directory} holds averages of rates {info.ema_rates}, none of {ema_rate}.")
    model = BCM(build_network(info.network), info.sigma_data)
    _load_weights(directory, index, _average_file(0 if ema_rate is None else info.ema_rates.index(ema_rate)), model)
    return model.to(device).eval().requires_grad_(False), info


def verify_files(directory: Path) -> None:
    """Raise `BCMError` unless every file that the index names is there with its SHA-256."""
    index = _read_index(directory)
    for name in dict(index.get("files") or {}):
        _read(directory, index, name)


def _average_file(index: int) -> str:
    return f"ema{index}" if index else "ema"


def _describe(model: BCM, network: NetworkConfig) -> dict[str, Any]:
    return {"network": network_to_dict(network), "sigma_data": model.sigma_data}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """`value` in the memory format of `like`, if it has its shape: the optimizer is slow where the two differ."""
    same = value.shape == like.shape
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value) if same else value


def _write(directory: Path, tensors: Mapping[str, dict[str, Tensor]], index: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / INDEX).unlink(missing_ok=True)
    for name, group in tensors.items():
        save_file(group, directory / f"{name}.safetensors")
    files = {name: _sha256(directory / f"{name}.safetensors") for name in tensors}
    partial = directory / f"{INDEX}.partial"
    partial.write_text(json.dumps({**FORMAT, **index, "files": files}, indent=1))
    partial.rename(directory / INDEX)


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BCMError(f"{directory} is no finished checkpoint: {INDEX} is missing. Choose another.") from error
    except ValueError as error:
        raise BCMError(f"{path} is damaged ({error}). Choose another checkpoint.") from error
    if not isinstance(index, dict) or {name: cast(Any, index).get(name) for name in FORMAT} != FORMAT:
        raise BCMError(f"{path} is not of format {FORMAT['format']} version {FORMAT['version']}.")
    return cast(dict[str, Any], index)


def _info(directory: Path, index: dict[str, Any]) -> CheckpointInfo:
    try:
        network = network_from_dict(index["network"])
        skipped = int(index.get("skipped", 0)), int(index.get("skipped_in_a_row", 0))
        rates = tuple(float(rate) for rate in index.get("ema_rates", ()))
        sigma_data, extra = float(index["sigma_data"]), dict(index["extra"])
        return CheckpointInfo(int(index["k"]), network, sigma_data, skipped, rates, extra)
    except (KeyError, TypeError, ValueError) as error:
        raise BCMError(f"{directory / INDEX}: {error}.") from error


def _check_architecture(directory: Path, found: NetworkConfig, wanted: NetworkConfig) -> None:
    a, b = network_to_dict(found), network_to_dict(wanted)
    differing = [f"{key} is {a.get(key)}, not {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)]
    if differing:
        raise BCMError(
            f"checkpoint {directory} holds another architecture: {'; '.join(differing)}. "
            "Use the recipe and network options it was trained with."
        )


def _check_rates(directory: Path, found: tuple[float, ...], wanted: tuple[float, ...]) -> None:
    """Averages of other rates cannot go on; a checkpoint that notes none has the one it was trained with."""
    if found != wanted and (found or len(wanted) > 1):
        raise BCMError(
            f"checkpoint {directory} holds averages of rates {found}, not {wanted}. Set train.ema-rates to what it "
            "was trained with."
        )


def _read(directory: Path, index: dict[str, Any], name: str) -> dict[str, Tensor]:
    path = directory / f"{name}.safetensors"
    files = index.get("files")
    expected = cast(dict[str, Any], files).get(name) if isinstance(files, dict) else None
    if expected is None:
        raise BCMError(f"checkpoint {directory} holds no {name} (it was saved for inference alone).")
    if not path.is_file() or _sha256(path) != expected:
        raise BCMError(f"{path} is missing or does not match the SHA-256 in {INDEX}. Choose another checkpoint.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise BCMError(f"{path} cannot be read: {error}.") from error


def _load_weights(directory: Path, index: dict[str, Any], name: str, module: nn.Module) -> None:
    try:
        module.load_state_dict(_read(directory, index, name))
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise BCMError(f"{directory / name}.safetensors does not fit the network: {first} ...") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
