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
from data.errors import DataError
from data.manifest import Manifest, load_manifest
from data.prepare import Choices, audit, dry_run, prepare
from pipelines.cli import AT_TOP_LEVEL, Bar, Positional, durable, parse, run_command


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Write a data set as WebDataset shards and a manifest, to any storage URL. The same command goes on after a kill.

    `prepare verify URL` checks every byte and image of a set, `prepare inspect URL` shows what is in it.
    """

    name: Positional
    """digits, cifar10, imagenet64, ffhq64, lsun-bedroom256, or a name of your own for images of your own."""
    to: str | None = None
    """URL of the folder to write; by default runs/data/NAME."""
    source: str | None = None
    """Path or URL of the archive, folder, zip file, lmdb or tars; digits need none."""
    choices: Annotated[Choices, AT_TOP_LEVEL] = field(default_factory=Choices)
    dry_run: bool = False
    """Look at the source and the place, print what would be made and how long it would take, and write nothing."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Compare every byte of a set with its manifest and decode every image; exit code 2 and a list of what is wrong."""

    url: Positional
    """URL of the folder with the manifest."""
    bytes_only: bool = False
    """Compare the bytes and decode no image."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Print counts, sizes and a histogram of the labels of a set, and draw a contact sheet of its images."""

    url: Positional
    """URL of the folder with the manifest."""
    out: str = "contact-sheet.png"
    """Picture to write: 100 images of each split."""


def write(options: PrepareOptions) -> None:
    """Prepare a set."""
    to = durable(options.to or f"runs/data/{options.name}", "--to")
    source = durable(options.source, "--source") if options.source else None
    run = partial(in_parallel, user_error=DataError)
    if options.dry_run:
        for line in dry_run(options.name, source, to, choices=options.choices, run=run):
            print(line)
        return
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
    manifest, shards = _examined(url, None if options.bytes_only else 0)
    audit.require_sound(url, manifest, shards)
    decoded = "" if options.bytes_only else ", and every image can be decoded"
    print(f"{audit.describe(manifest, url)}\nevery byte is as the manifest says{decoded}")


def inspect(options: InspectOptions) -> None:
    """Describe a set."""
    url = durable(options.url, "URL")
    manifest, shards = _examined(url, 100)
    shards.sort(key=lambda found: (found.split, found.shard.path))
    audit.require_sound(url, manifest, shards)
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
