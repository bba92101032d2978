"""`python -m pipelines.import_weights FILE`: weights of other code bases as a model that every command here takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bcm.convert import SOURCES
from bcm.inference import check_task
from data import store
from pipelines.cli import File, durable, parse, run_command
from pipelines.errors import ConfigError, nearest
from pipelines.models.foreign import convert_file, describe, stored
from pipelines.recipes import recipe
from pipelines.tracking import client, registry


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Turn the ImageNet-64 weights of the paper's authors, or a state dict of EDM's NCSN++, into a model of ours.

    A consistency model of one time was trained with another skip weight than ours (the paper's Eq. 54), which makes a
    difference of at most a quarter of a grey level in its images; nothing else is changed.
    """

    file: File
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
    time_steps: str | None = None
    """Published time steps that it starts with; by default those of its source and objective."""
    register: str | None = None
    """Name to register the model under at once, without scores; pipelines.register does it with them."""
    dry_run: bool = False
    """Read and check the file, print what would become of it, and write nothing."""

    def __post_init__(self) -> None:
        """Check names."""
        if self.source not in SOURCES:
            raise ConfigError(f"unknown --source '{self.source}': {nearest(self.source, SOURCES)}")


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(ImportOptions, argv, "import_weights")
    to = durable(options.to, "--to")
    if store.list_names(to):
        raise ConfigError(f"{to} is not empty. Give --to another folder.")
    if options.register:
        client.connect(client.resolve_uri("runs"))
    toolkit, origin = convert_file(
        options.file,
        options.source,
        network=recipe(options.network).network if options.network else None,
        network_options=options.network_options,
        objective=options.objective,
        time_steps=options.time_steps,
    )
    if options.register:
        check_task(toolkit, "sample")
    if options.dry_run:
        print(f"{describe(toolkit, origin)}\nwould write it to {to}, with {', '.join(toolkit.schedules)}")
        return
    with stored(toolkit, origin, to) as folder:
        left_out = ", ".join(origin.left_out) or "nothing"
        print(f"wrote {to}, a model of objective {origin.objective}; left out: {left_out}")
        if options.register:
            tags, uri = {"imported": to, "sha256": origin.sha256}, client.resolve_uri("runs")
            registered = registry.register(uri, name=options.register, folder=folder, scores={}, tags=tags)
            print(f"{registered.name} version {registered.version}: {registered.reason}")


if __name__ == "__main__":
    run_command(main)
