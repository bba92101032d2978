"""Weights of other code bases: read without running any of it, checked, and made a model of ours."""

import hashlib
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from bcm import strict
from bcm.convert import OFFICIAL, convert, infer_network, unused
from bcm.inference import Toolkit, save_toolkit
from bcm.networks import NetworkConfig, build_network
from bcm.precond import BCM
from bcm.timesteps import PUBLISHED
from data import store
from pipelines.errors import ConfigError, nearest
from pipelines.models.checkpoints import upload
from pipelines.models.run import code_version

ORIGIN = "origin.json"
"""What an imported model says of itself beside its weights and time steps."""


@contextmanager
def local_file(url: str) -> Iterator[Path]:
    """The file at `url` on this machine, under its own name."""
    if store.is_local(url):
        path = Path(store.absolute(url))
        if not path.is_file():
            raise ConfigError(f"there is no file {path}. Check the spelling.")
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="bcm-import-") as folder:
        path = Path(folder) / PurePosixPath(without_query(url)).name
        store.fetch(url, None, None, path)
        yield path


def without_query(url: str) -> str:
    """A signed URL's secrets stand behind its question mark."""
    return url.split("?")[0] if "://" in url else url


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by name; nothing in the file is run.

    Raises:
        ConfigError: the file is cut short, of another kind, or holds anything but tensors.
    """
    readers = {".pt": _read_torch, ".pth": _read_torch, ".npz": _read_npz, ".safetensors": load_file}
    if path.suffix not in readers:
        raise ConfigError(f"{path.name} is of an unknown kind; known are {', '.join(readers)}.")
    try:
        entries: Any = readers[path.suffix](path)
    except ConfigError:
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise
        cause = " ".join(str(error).split())[:200].rstrip(".") or "it ends too early"
        raise ConfigError(
            f"{path.name} cannot be read as {path.suffix} ({type(error).__name__}: {cause}): "
            "it is cut short, damaged or of another kind. Fetch it again."
        ) from error
    if not isinstance(entries, Mapping) or not entries:
        raise ConfigError(f"{path.name} holds no state dict but {type(entries).__name__}. {_SAVE_ALONE}")
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"{path.name}: the entry {name!r} is no tensor but {type(value).__name__}. {_SAVE_ALONE}")
        if not value.isfinite().all():
            raise ConfigError(f"{path.name}: the tensor {name} holds values that are not finite.")
    return {str(name): value.detach() for name, value in entries.items()}


_SAVE_ALONE = "Save the state dict alone: torch.save(network.state_dict(), 'weights.pt')."


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ConfigError(
                f"{path.name} is a pickle of more than tensors: to load it would run code of its author "
                f"({named[1]}), which is refused. Where you trust it, load it with its own code. {_SAVE_ALONE}"
            ) from error
        if "weights_only" in str(error):  # torch goes on to advise loading it with all its code
            raise ValueError("it holds no state dict") from error
        raise


def _read_npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where imported weights come from; kept with the model."""

    objective: str
    source: str
    file: str
    sha256: str
    left_out: tuple[str, ...]
    """Tensors without effect on plain images."""
    code: str
    """Git commit of the code that imported them."""


def network_for(
    tensors: Mapping[str, Tensor], source: str, network: NetworkConfig | None, options: Sequence[str]
) -> NetworkConfig:
    """The network that weights are taken for: the one given, or what the tensors show, with the fields in `options`."""
    settings = {name: _value(value) for name, _, value in (text.partition("=") for text in options)}
    resolution = settings.get("resolution")
    known = network or infer_network(tensors, source, resolution if isinstance(resolution, int) else None)
    entry: dict[str, Any] = strict.dump(known)
    for name in settings:
        if name not in entry:
            raise ConfigError(f"--network-options: unknown field '{name}'; {nearest(name, list(entry))}")
    kind: Any = NetworkConfig
    return strict.read(kind, json.dumps(entry | settings), f"--network-options {' '.join(options)}", ConfigError)


def _value(text: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def objective_for(network: NetworkConfig, source: str, wanted: str | None) -> str:
    """What the weights were trained for."""
    if network.times == 2:
        if wanted:
            raise ConfigError(f"--objective {wanted} is for networks of one time; this one has two.")
        return "bct"
    return wanted or ("ct" if source == OFFICIAL else "edm")


def convert_file(
    file: str,
    source: str,
    *,
    network: NetworkConfig | None,
    network_options: Sequence[str],
    objective: str | None,
    time_steps: str | None,
) -> tuple[Toolkit, Origin]:
    """Read, check and convert the file at a path or URL: the model, and where it comes from.

    Args:
        file: a state dict.
        source: what wrote it, one of `bcm.convert.SOURCES`.
        network: the network it must fit; None to read it off the tensors.
        network_options: fields of it to set, each NAME=VALUE.
        objective: what a network of one time was trained for, ct or edm; None for what is usual.
        time_steps: name of the published time steps it starts with; None for those of its source and objective.
    """
    with local_file(file) as path:
        tensors = read_tensors(path)
        fitting = network_for(tensors, source, network, network_options)
        trained_for = objective_for(fitting, source, objective)
        model = BCM(build_network(fitting))
        model.F_theta.load_state_dict(convert(tensors, source, fitting))
        with path.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    model.eval().requires_grad_(False)
    usual = f"{'' if fitting.times == 2 else 'ct-'}{'imagenet64' if source == OFFICIAL else 'cifar10'}"
    if time_steps is not None and time_steps not in PUBLISHED:
        raise ConfigError(f"unknown --time-steps '{time_steps}': {nearest(time_steps, list(PUBLISHED))}")
    toolkit = Toolkit(
        model=model, network=fitting, k=0, schedules=PUBLISHED[time_steps or usual], objective=trained_for
    )
    origin = Origin(
        objective=trained_for,
        source=source,
        file=without_query(file),
        sha256=sha256,
        left_out=tuple(unused(tensors, source)),
        code=code_version(),
    )
    return toolkit, origin


@contextmanager
def stored(toolkit: Toolkit, origin: Origin, to: str) -> Iterator[Path]:
    """Write the model, and where it comes from, to the folder at the URL `to`; a local copy, for the block alone."""
    with tempfile.TemporaryDirectory(prefix="bcm-import-") as parent:
        folder = Path(parent) / "checkpoint"
        save_toolkit(folder, toolkit, {ORIGIN: json.dumps(strict.dump(origin), indent=1).encode()})
        upload(folder, to)
        yield folder


def describe(toolkit: Toolkit, origin: Origin) -> str:
    """What was read: its origin, the network, and every tensor of it."""
    weights = toolkit.model.F_theta.state_dict()
    lines = [f"{name:9} {value}" for name, value in strict.dump(origin).items()]
    lines += [f"network   {json.dumps(strict.dump(toolkit.network))}"]
    lines += [f"  {name} {tuple(tensor.shape)}" for name, tensor in weights.items()]
    return "\n".join([*lines, f"{len(weights)} tensors, {sum(w.numel() for w in weights.values()):,} numbers, all fit"])
