"""`python -m pipelines.prepare NAME --source URL --to URL`: images into WebDataset shards; also `verify`, `inspect`."""

import io
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from cluster.tasks import in_parallel
from data import store
from data.catalog import DATASETS
from data.errors import DataError
from data.manifest import Manifest, load_manifest
from data.prepare import Choices, audit, prepare
from data.prepare.pack import SAMPLES_PER_SHARD
from pipelines.cli import Bar, Positional, durable, parse, run_command


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
    resolution: int | None = None
    """Height and width; needed for images of your own, which are cropped to their centre and resized."""
    channels: int | None = None
    """1 (grey) or 3 (RGB) for images of your own, by default 3."""
    flip: bool = False
    """Training may mirror images of your own; the catalog knows it of its sets."""
    encoding: str | None = None
    """raw, png or webp, all without loss; by default raw up to 64 px and webp above."""
    held_out: int | None = None
    """Images for the test split where the source marks none; by default a tenth, at most 1,000."""
    samples_per_shard: int = SAMPLES_PER_SHARD
    """Images in a shard."""
    rewrite: bool = False
    """Crop and resize an existing WebDataset into new shards, rather than describe its tars as they are."""
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
    choices = Choices(
        resolution=options.resolution,
        channels=options.channels,
        flip=options.flip or None,
        encoding=options.encoding,
        held_out=options.held_out,
        samples_per_shard=options.samples_per_shard,
        rewrite=options.rewrite,
    )
    if options.dry_run:
        counts = ", ".join(f"{count:,} {split}" for split, count in known.splits.items()) if known else "all"
        size = known.resolution if known else options.resolution
        print(f"{options.name}: {counts} images of {size or 'their own'} px -> {to}")
        return
    # A CIFAR-10 archive is unpacked here, wherever it comes from.
    here = options.name == "cifar10" or store.is_local(to) or (source is not None and store.is_local(source))
    run = partial(in_parallel, here=here, user_error=DataError)
    with closing(Bar("images")) as bar:
        manifest = prepare(options.name, source, to, choices=choices, progress=bar, run=run)
    print(audit.describe(manifest, to))


def _examined(url: str, manifest: Manifest, keep: int | None) -> list[audit.Examined]:
    """All shards of a set, in the order in which they were read."""
    run = partial(in_parallel, here=store.is_local(manifest.place(url)), user_error=DataError)
    with closing(Bar("shards")) as bar:
        return list(audit.examined(url, manifest, keep, run, partial(bar, "shards")))


def verify(options: VerifyOptions) -> None:
    """Check a set."""
    url = durable(options.url, "URL")
    manifest = load_manifest(url)
    audit.require_sound(url, sorted(found.problem for found in _examined(url, manifest, None) if found.problem))
    print(f"{audit.describe(manifest, url)}\nevery byte is as the manifest says")


def inspect(options: InspectOptions) -> None:
    """Describe a set."""
    url = durable(options.url, "URL")
    manifest = load_manifest(url)
    shards = sorted(_examined(url, manifest, 100), key=lambda found: (found.split, found.shard.path))
    audit.require_sound(url, [found.problem for found in shards if found.problem])
    print(audit.describe(manifest, url))
    size = f"{manifest.resolution}x{manifest.resolution}, {manifest.channels} channels"
    print(f"{size}; mirroring {'allowed' if manifest.flip else 'not allowed'}; {len(manifest.class_names)} classes")
    for split in manifest.splits:
        counts = np.sum([found.labels for found in shards if found.split == split], axis=0)
        print(audit.histogram(split, manifest.class_names, counts))
    images = [image for found in shards for image in found.images]
    buffer = io.BytesIO()
    Image.fromarray(audit.contact_sheet(images, columns=20)).save(buffer, format="PNG")
    store.write_bytes(options.out, buffer.getvalue())
    print(f"{len(images)} images in {options.out}")


_FORMS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "verify": (VerifyOptions, verify),
    "inspect": (InspectOptions, inspect),
}


def main(argv: Sequence[str]) -> None:
    """The command line."""
    if argv and argv[0] in _FORMS:
        kind, do = _FORMS[argv[0]]
        do(parse(kind, argv[1:], f"prepare {argv[0]}"))
    else:
        write(parse(PrepareOptions, argv, "prepare"))


if __name__ == "__main__":
    run_command(main)
