"""`python -m pipelines.prepare NAME --source URL --to URL`: images into WebDataset shards; also `verify`, `inspect`."""

import io
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from PIL import Image

from cluster.tasks import in_parallel
from data import store
from data.catalog import DATASETS
from data.errors import DataError
from data.manifest import Manifest, load_manifest
from data.prepare import Choices, audit, prepare
from pipelines.cli import AT_TOP_LEVEL, Bar, Positional, durable, parse, run_command


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Write a data set as WebDataset shards and a manifest, to any storage URL. The same command goes on after a kill.

    `prepare verify URL` checks every byte of a set, `prepare inspect URL` shows what is in it.
    """

    name: Positional
    """digits, cifar10, imagenet64, ffhq64, lsun-bedroom256, or a name of your own for images of your own."""
    to: str | None = None
    """URL of the folder to write; by default runs/data/NAME."""
    source: str | None = None
    """Path or URL of the archive, folder, zip file, lmdb or tars; digits need none."""
    choices: Annotated[Choices, AT_TOP_LEVEL] = field(default_factory=Choices)
    anonymous: bool = False
    """Read --source, an s3:// URL of a public bucket, without keys."""
    dry_run: bool = False
    """Print what would be written and write nothing."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Compare every byte of a set with its manifest; exit code 2 and a list if anything differs."""

    url: Positional
    """URL of the folder with the manifest."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Print counts, sizes and a histogram of the labels of a set, and draw a contact sheet of its images."""

    url: Positional
    """URL of the folder with the manifest."""
    out: str = "contact-sheet.png"
    """Picture to write: 100 images of each split."""


def write(options: PrepareOptions) -> None:
    """Prepare a set."""
    known = DATASETS.get(options.name)
    to = durable(options.to or f"runs/data/{options.name}", "--to")
    source = durable(options.source, "--source") if options.source else None
    source = store.anonymous(source or "") if options.anonymous else source
    if options.dry_run:
        counts = ", ".join(f"{count:,} {split}" for split, count in known.splits.items()) if known else "all"
        size = known.resolution if known else options.choices.resolution
        print(f"{options.name}: {counts} images of {size or 'their own'} px -> {to}")
        return
    # A CIFAR-10 archive is unpacked here, wherever it comes from.
    here = options.name == "cifar10" or store.is_local(to) or (source is not None and store.is_local(source))
    run = partial(in_parallel, here=here, user_error=DataError)
    with closing(Bar("images")) as bar:
        manifest = prepare(options.name, source, to, choices=options.choices, progress=bar, run=run)
    print(audit.describe(manifest, to))


def _examined(url: str, keep: int | None) -> tuple[Manifest, list[audit.Examined]]:
    """The manifest of a set, and all its shards in the order in which they were read."""
    manifest = load_manifest(url)
    run = partial(in_parallel, here=store.is_local(manifest.place(url)), user_error=DataError)
    with closing(Bar("shards")) as bar:
        return manifest, list(audit.examined(url, manifest, keep, run, partial(bar, "shards")))


def verify(options: VerifyOptions) -> None:
    """Check a set."""
    url = durable(options.url, "URL")
    manifest, shards = _examined(url, None)
    audit.require_sound(url, sorted(found.problem for found in shards if found.problem))
    print(f"{audit.describe(manifest, url)}\nevery byte is as the manifest says")


def inspect(options: InspectOptions) -> None:
    """Describe a set."""
    url = durable(options.url, "URL")
    manifest, shards = _examined(url, 100)
    shards.sort(key=lambda found: (found.split, found.shard.path))
    audit.require_sound(url, [found.problem for found in shards if found.problem])
    print(audit.report(manifest, url, shards))
    images = [image for found in shards for image in found.images]
    buffer = io.BytesIO()
    Image.fromarray(audit.contact_sheet(images, columns=20)).save(buffer, format="PNG")
    store.write_bytes(options.out, buffer.getvalue())
    print(f"{len(images)} images in {options.out}")


def main(argv: Sequence[str]) -> None:
    """The command line."""
    match list(argv):
        case ["verify", *rest]:
            verify(parse(VerifyOptions, rest, "prepare verify"))
        case ["inspect", *rest]:
            inspect(parse(InspectOptions, rest, "prepare inspect"))
        case _:
            write(parse(PrepareOptions, argv, "prepare"))


if __name__ == "__main__":
    run_command(main)
