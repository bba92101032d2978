"""`python -m pipelines.import_weights FILE`: weights of other code bases as a model that every command here takes."""

import hashlib
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from bcm.convert import SOURCES, convert, infer_network, unused
from bcm.inference import Toolkit, check_task, paper_schedules, save_toolkit
from bcm.networks import NetworkConfig, build_network, network_from_dict, network_to_dict
from bcm.precond import BCM
from data import store
from pipelines.cli import Positional, parse, run_command
from pipelines.errors import ConfigError, nearest
from pipelines.recipes import recipe
from pipelines.tracking import client as tracking
from pipelines.tracking import registry
from pipelines.training import run as runs


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Turn the ImageNet-64 weights of the paper's authors, or a state dict of EDM's NCSN++, into a model of ours.

    A consistency model of one time was trained with another skip weight than ours (the paper's Eq. 54), which makes a
    difference of at most a quarter of a grey level in its images; nothing else is changed.
    """

    file: Positional
    """Path or URL of a state dict: .pt or .pth (nothing but tensors), .safetensors or .npz."""
    source: str
    """Where the weights come from: official-imagenet64 or edm-ncsnpp."""
    to: str
    """URL of the folder to write, which must be empty or absent."""
    network: str | None = None
    """Recipe whose network these weights must fit; by default the network is read off the tensors."""
    network_options: tuple[str, ...] = ()
    """Fields of the network to set. Tensors do not show resolution=64 head_channels=64 attention_norm=qkv of an ADM."""
    objective: Literal["ct", "edm"] | None = None
    """What a network of one time is: ct, a consistency model, or edm, a denoiser; by default edm for edm-ncsnpp."""
    register: str | None = None
    """Name to register the model under at once, without scores; pipelines.register does it with them."""
    dry_run: bool = False
    """Read and check the file, print what would become of it, and write nothing."""

    def __post_init__(self) -> None:
        """Check names."""
        if self.source not in SOURCES:
            raise ConfigError(f"unknown --source '{self.source}': {nearest(self.source, SOURCES)}")


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
        path = Path(folder) / PurePosixPath(_without_query(url)).name
        store.fetch(url, None, None, path)
        yield path


def _without_query(url: str) -> str:
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


def network_of(options: ImportOptions, tensors: Mapping[str, Tensor]) -> NetworkConfig:
    """The network that the weights are taken for."""
    settings = {name: _value(value) for name, _, value in (text.partition("=") for text in options.network_options)}
    try:
        if options.network:
            network = recipe(options.network).network
        else:
            network = infer_network(tensors, options.source, settings.get("resolution"))
        entry = network_to_dict(network)
        for name in settings:
            if name not in entry:
                raise ConfigError(f"--network-options: unknown field '{name}'; {nearest(name, list(entry))}")
        return network_from_dict(entry | settings)
    except TypeError as error:
        raise ConfigError(f"--network-options {' '.join(options.network_options)}: {error}.") from error


def _value(text: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def objective_of(options: ImportOptions, network: NetworkConfig) -> str:
    """What the weights were trained for."""
    if network.times == 2:
        if options.objective:
            raise ConfigError(f"--objective {options.objective} is for networks of one time; this one has two.")
        return "bct"
    return options.objective or ("edm" if options.source == "edm-ncsnpp" else "ct")


def import_weights(options: ImportOptions) -> tuple[Toolkit, dict[str, Any]]:
    """Read, check and convert the file: the model, and what its checkpoint is to say of its origin."""
    with local_file(options.file) as path:
        tensors = read_tensors(path)
        network = network_of(options, tensors)
        objective = objective_of(options, network)
        model = BCM(build_network(network))
        model.F_theta.load_state_dict(convert(tensors, options.source, network))
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    model.eval().requires_grad_(False)
    toolkit = Toolkit(
        model=model, network=network, k=0, schedules=paper_schedules(network), denoiser=objective == "edm"
    )
    notes = {"objective": objective, "source": options.source, "file": _without_query(options.file), "sha256": sha256}
    return toolkit, {**notes, "left_out": unused(tensors, options.source), "code": runs.code_version()}


def describe(toolkit: Toolkit, notes: Mapping[str, Any]) -> str:
    """What was read: its origin, the network, and every tensor of it."""
    weights = toolkit.model.F_theta.state_dict()
    lines = [f"{name:9} {value}" for name, value in notes.items()]
    lines += [f"network   {json.dumps(network_to_dict(toolkit.network))}"]
    lines += [f"  {name} {tuple(tensor.shape)}" for name, tensor in weights.items()]
    return "\n".join([*lines, f"{len(weights)} tensors, {sum(w.numel() for w in weights.values()):,} numbers, all fit"])


def write_model(toolkit: Toolkit, notes: Mapping[str, Any], to: str, name: str | None) -> None:
    """Write the model to the URL `to` and register it as `name`, if any."""
    with tempfile.TemporaryDirectory(prefix="bcm-import-") as folder:
        directory = Path(folder)
        save_toolkit(directory, toolkit, notes)
        runs.upload_checkpoint(directory, to)
        print(f"wrote {to}, a model of objective {notes['objective']}; left out: {notes['left_out'] or 'nothing'}")
        if name:
            registered = registry.register(
                tracking.resolve_uri("runs"),
                name=name,
                checkpoint_dir=directory,
                schedules=toolkit.schedules,
                scores={},
                tags={"imported": to, "sha256": notes["sha256"]},
            )
            print(f"{name} version {registered.version}: {registered.reason}")


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(ImportOptions, argv, "import_weights")
    to = runs.durable(options.to, "--to")
    if store.list_names(to):
        raise ConfigError(f"{to} is not empty. Give --to another folder.")
    if options.register:
        tracking.connect(tracking.resolve_uri("runs"))
    toolkit, notes = import_weights(options)
    if options.register:
        check_task(toolkit, "sample")
    if options.dry_run:
        print(f"{describe(toolkit, notes)}\nwould write it to {to}, with {', '.join(toolkit.schedules)}")
        return
    write_model(toolkit, notes, to, options.register)


if __name__ == "__main__":
    run_command(main)
