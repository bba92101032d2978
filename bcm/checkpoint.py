"""Checkpoints: a directory of safetensors and JSON, never pickle.

`checkpoint.json`, the index, is written last and names every other file with its SHA-256, so a directory that was not
finished or was changed is never taken for a checkpoint.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from bcm import strict
from bcm.networks import NetworkConfig, build_network
from bcm.objectives import OBJECTIVES
from bcm.precond import BCM
from bcm.training import TrainState
from bcm.types import BCMError

INDEX = "checkpoint.json"

_FILE = re.compile(r"\w[\w.-]*", re.ASCII)
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Index:
    """What a checkpoint says of itself, in `checkpoint.json`."""

    format: Literal["bcm-checkpoint"] = "bcm-checkpoint"
    version: Literal[2] = 2
    k: int
    """Training iterations done."""
    network: NetworkConfig
    sigma_data: float
    objective: str
    """What the weights were trained for, a name in `bcm.objectives.OBJECTIVES`; "" where that is not known."""
    skipped: int
    """Steps skipped for non-finite gradients, in all."""
    skipped_in_a_row: int
    """The same, in a row now."""
    ema_rates: tuple[float, ...]
    """mu_EMA of each average, the serving one first; empty for a model that stands for inference alone."""
    files: Mapping[str, str]
    """SHA-256 of each other file, by name; all of them lie beside the index."""

    def __post_init__(self) -> None:
        """Check what the types do not say."""
        if self.k < 0 or not 0 <= self.skipped_in_a_row <= self.skipped:
            raise BCMError(
                f"k={self.k}, skipped={self.skipped}, skipped_in_a_row={self.skipped_in_a_row}: each must be "
                "0 or more, and skipped_in_a_row at most skipped."
            )
        if not 0 < self.sigma_data < math.inf:
            raise BCMError(f"sigma_data={self.sigma_data} must be positive and finite.")
        if self.objective not in ("", *OBJECTIVES):
            raise BCMError(f"objective '{self.objective}' is unknown; known are {', '.join(OBJECTIVES)}.")
        if not all(0 <= rate < 1 for rate in self.ema_rates):
            raise BCMError(f"ema_rates={self.ema_rates} must lie in [0, 1).")
        for name, digest in self.files.items():
            if not _FILE.fullmatch(name) or not _DIGEST.fullmatch(digest):
                raise BCMError(f"files: {name!r} with SHA-256 {digest!r} is no file beside this index.")

    def average(self, ema_rate: float | None = None) -> str:
        """Name of the file with the averaged weights of a rate; without one, of the average that serves."""
        if ema_rate is not None and ema_rate not in self.ema_rates:
            raise BCMError(f"this checkpoint holds averages of rates {self.ema_rates}, none of {ema_rate}.")
        return _average_file(0 if ema_rate is None else self.ema_rates.index(ema_rate))

    def for_inference(self, ema_rate: float | None = None) -> "Index":
        """The index of a model for inference alone, whose one file is that average."""
        if (name := self.average(ema_rate)) not in self.files:
            raise BCMError(f"this checkpoint holds no {name}.")
        return replace(self, ema_rates=(), files={_average_file(0): self.files[name]})


def save_checkpoint(
    directory: Path, state: TrainState, network: NetworkConfig, attachments: Mapping[str, bytes] | None = None
) -> None:
    """Write weights, averages, optimizer and progress of `state`.

    Args:
        directory: where to; made if need be.
        state: what to save.
        network: rebuilds the architecture.
        attachments: other files by name, such as what the writer notes of the run; they are read with `attachment`.
    """
    moments = {
        f"{index}.{name}": value.contiguous()
        for index, entry in state.optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    averages = {_average_file(i): _tensors(average) for i, average in enumerate(state.averages.values())}
    index = Index(
        k=state.k,
        network=network,
        sigma_data=state.model.sigma_data,
        objective=state.objective,
        skipped=state.skipped,
        skipped_in_a_row=state.skipped_in_a_row,
        ema_rates=tuple(state.averages),
        files={},
    )
    tensors = {_MODEL: _tensors(state.model), **averages, _OPTIMIZER: moments}
    _write(directory, index, tensors, attachments or {})


def load_checkpoint(directory: Path, state: TrainState, network: NetworkConfig) -> Index:
    """Continue from `directory`, bit for bit; another architecture or other EMA rates are an error."""
    index = local_index(directory)
    _check_architecture(directory, index.network, network)
    rates = tuple(state.averages)
    if index.ema_rates != rates and (index.ema_rates or len(rates) > 1):
        raise BCMError(
            f"checkpoint {directory} holds averages of rates {index.ema_rates}, not {rates}. Set train.ema-rates to "
            "what it was trained with."
        )
    _load_weights(directory, index, _MODEL, state.model)
    for i, average in enumerate(state.averages.values()):
        _load_weights(directory, index, _average_file(i), average)
    moments: dict[int, dict[str, Tensor]] = {}
    parameters = list(state.model.parameters())
    for name, value in _read(directory, index, _OPTIMIZER).items():
        position, key = name.split(".", 1)
        like = parameters[int(position)]
        if value.shape == like.shape:  # in another memory format than the weights it would slow the optimizer down
            value = torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
        moments.setdefault(int(position), {})[key] = value
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    state.k, state.skipped, state.skipped_in_a_row = index.k, index.skipped, index.skipped_in_a_row
    return index


def save_model(
    directory: Path,
    model: BCM,
    network: NetworkConfig,
    *,
    k: int,
    objective: str,
    attachments: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model for inference alone: its weights stand as the average."""
    index = Index(
        k=k,
        network=network,
        sigma_data=model.sigma_data,
        objective=objective,
        skipped=0,
        skipped_in_a_row=0,
        ema_rates=(),
        files={},
    )
    _write(directory, index, {_average_file(0): _tensors(model)}, attachments or {})


def load_model(directory: Path, device: torch.device | str = "cpu", ema_rate: float | None = None) -> tuple[BCM, Index]:
    """The model to use for inference (EMA weights, eval mode), and what its checkpoint says.

    Of the checkpoint's files it reads the index and `Index.average(ema_rate)` alone. `ema_rate` chooses one of several
    averages; without it, the one that serves.
    """
    index = local_index(directory)
    model = BCM(build_network(index.network), index.sigma_data)
    _load_weights(directory, index, index.average(ema_rate), model)
    return model.to(device).eval().requires_grad_(False), index


def read_index(text: str | bytes, where: str) -> Index:
    """The index in a JSON text that stands at `where`; what is wrong with it is a `BCMError`."""
    return strict.read(
        Index,
        text,
        where,
        lambda problem: BCMError(f"{problem.rstrip('.')}. Choose another checkpoint."),
        complete=True,
    )


def local_index(directory: Path) -> Index:
    """The index of the checkpoint in a local directory."""
    path = directory / INDEX
    try:
        return read_index(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise BCMError(f"{directory} is no finished checkpoint: {INDEX} is missing. Choose another.") from error


def attachment(directory: Path, name: str) -> bytes:
    """The attached file called `name`, its SHA-256 compared."""
    return _verified(directory, local_index(directory), name).read_bytes()


def verify_files(directory: Path) -> None:
    """Raise `BCMError` unless every file that the index names is there with its SHA-256."""
    index = local_index(directory)
    for name in index.files:
        _verified(directory, index, name)


_MODEL, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"


def _average_file(index: int) -> str:
    return f"ema{index or ''}.safetensors"


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}


def _write(
    directory: Path, index: Index, tensors: Mapping[str, dict[str, Tensor]], attachments: Mapping[str, bytes]
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / INDEX).unlink(missing_ok=True)
    for name, group in tensors.items():
        save_file(group, directory / name)
    for name, content in attachments.items():
        (directory / name).write_bytes(content)
    files = {name: _sha256(directory / name) for name in (*tensors, *attachments)}
    write_index(directory, replace(index, files=files))


def write_index(directory: Path, index: Index) -> None:
    """Write the index of a local checkpoint, after which it counts as finished."""
    partial = directory / f"{INDEX}.partial"
    partial.write_text(json.dumps(strict.dump(index), indent=1))
    partial.rename(directory / INDEX)


def _check_architecture(directory: Path, stored: NetworkConfig, wanted: NetworkConfig) -> None:
    a: dict[str, Any] = strict.dump(stored)
    b: dict[str, Any] = strict.dump(wanted)
    differing = [f"{key} is {a.get(key)}, not {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)]
    if differing:
        raise BCMError(
            f"checkpoint {directory} holds another architecture: {'; '.join(differing)}. "
            "Use the recipe and network options it was trained with."
        )


def _verified(directory: Path, index: Index, name: str) -> Path:
    """The path of a file that the index names, if it has the SHA-256 it must have."""
    path = directory / name
    if name not in index.files:
        raise BCMError(f"checkpoint {directory} holds no {name} (it was saved for inference alone).")
    if not path.is_file() or _sha256(path) != index.files[name]:
        raise BCMError(f"{path} is missing or does not match the SHA-256 in {INDEX}. Choose another checkpoint.")
    return path


def _read(directory: Path, index: Index, name: str) -> dict[str, Tensor]:
    path = _verified(directory, index, name)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise BCMError(f"{path} cannot be read: {error}.") from error


def _load_weights(directory: Path, index: Index, name: str, module: nn.Module) -> None:
    try:
        module.load_state_dict(_read(directory, index, name))
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise BCMError(f"{directory / name} does not fit the network: {first} ...") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
