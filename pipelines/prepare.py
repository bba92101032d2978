"""`python -m pipelines.prepare NAME --to URL`: a data set from its official source into WebDataset shards."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.catalog import facts
from data.manifest import Manifest
from data.sources import prepare
from pipelines import runs
from pipelines.config import Positional, parse, run_command


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Write a data set as WebDataset shards and a manifest, to any storage URL."""

    name: Positional
    """Name of the data set: digits or cifar10."""
    to: str | None = None
    """URL of the folder to write; by default runs/data/NAME."""
    source: str | None = None
    """Path or URL of the official archive (cifar10: cifar-10-python.tar.gz); digits need none."""
    dry_run: bool = False
    """Print what would be written and write nothing."""


def describe(manifest: Manifest, url: str) -> str:
    """One line a split."""
    lines = [f"{manifest.name} at {url} (manifest {manifest.sha256[:12]})"]
    for split, part in manifest.splits.items():
        megabytes = sum(shard.bytes for shard in part.shards) / 1e6
        lines.append(f"  {split:6s} {part.count:>7,} images in {len(part.shards)} shards, {megabytes:.1f} MB")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(PrepareOptions, argv, "prepare")
    known = facts(options.name)
    to = runs.durable(options.to or f"runs/data/{options.name}", "--to")
    if options.dry_run:
        counts = ", ".join(f"{count:,} {split}" for split, count in known.splits.items())
        print(f"{known.name}: {counts} images of {known.resolution} px, {known.channels} channels -> {to}")
        return

    def progress(split: str, done: int, total: int) -> None:
        print(f"{split} {done}/{total}", flush=True)

    print(describe(prepare(options.name, options.source, to, progress=progress), to))


if __name__ == "__main__":
    run_command(main)
