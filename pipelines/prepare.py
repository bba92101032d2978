"""`python -m pipelines.prepare NAME --source URL --to URL`: images into WebDataset shards; also `verify`, `inspect`."""

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from cluster.tasks import in_parallel
from data import store
from data.catalog import DATASETS
from data.errors import DataError
from data.manifest import Manifest, load_manifest
from data.prepare import Choices, audit, prepare
from data.prepare.pack import SAMPLES_PER_SHARD
from pipelines.cli import Positional, durable, parse, run_command

_LINE_SECONDS = 10.0
_BAR = 40


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


def describe(manifest: Manifest, url: str) -> str:
    """One line a split."""
    lines = [f"{manifest.name} at {url} (manifest {manifest.sha256[:12]})"]
    for split, part in manifest.splits.items():
        megabytes = sum(shard.bytes for shard in part.shards) / 1e6
        lines.append(f"  {split:6s} {part.count:>7,} images in {len(part.shards)} shards, {megabytes:.1f} MB")
    return "\n".join(lines)


class Bar:
    """A progress bar on a terminal; elsewhere a line now and then."""

    def __init__(self, unit: str) -> None:
        """Draws nothing until something is done."""
        self._unit = unit
        self._bars: dict[str, tqdm[Any]] = {}
        self._told = 0.0

    def __call__(self, title: str, done: int, total: int) -> None:
        """`done` of `total` are done."""
        if sys.stderr.isatty():
            if title not in self._bars:
                self._bars[title] = tqdm(desc=title, total=total, unit=self._unit, position=len(self._bars))
            self._bars[title].update(done - self._bars[title].n)
        elif done == total or time.monotonic() > self._told + _LINE_SECONDS:
            self._told = time.monotonic()
            print(f"{title} {done}/{total}", flush=True)

    def close(self) -> None:
        """Leaves the cursor below the bars."""
        for bar in self._bars.values():
            bar.close()


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
    bar = Bar("images")
    try:
        run = partial(in_parallel, here=here, user_error=DataError)
        manifest = prepare(options.name, source, to, choices=choices, progress=bar, run=run)
    finally:
        bar.close()
    print(describe(manifest, to))


def _seen(url: str, manifest: Manifest, keep: int | None) -> Iterator[audit.Seen]:
    """All shards of a set, in the order in which they are read."""
    looks = audit.looks(manifest, keep or 0)
    call = partial(audit.see, url=url, facts=audit.without_shards(manifest), decode=keep is not None)
    bar = Bar("shards")
    try:
        for number, seen in enumerate(
            in_parallel(call, looks, here=store.is_local(manifest.place(url)), user_error=DataError), start=1
        ):
            bar("shards", number, len(looks))
            yield seen
    finally:
        bar.close()


def _require_sound(url: str, problems: Sequence[str]) -> None:
    if problems:
        listed = "\n  ".join(problems)
        raise DataError(f"{len(problems)} shards of {url} are not as its manifest says:\n  {listed}")


def verify(options: VerifyOptions) -> None:
    """Check a set."""
    url = durable(options.url, "URL")
    manifest = load_manifest(url)
    _require_sound(url, sorted(seen.problem for seen in _seen(url, manifest, None) if seen.problem))
    print(f"{describe(manifest, url)}\nevery byte is as the manifest says")


def inspect(options: InspectOptions) -> None:
    """Describe a set."""
    url = durable(options.url, "URL")
    manifest = load_manifest(url)
    found = sorted(_seen(url, manifest, 100), key=lambda seen: (seen.look.split, seen.look.shard.path))
    _require_sound(url, [seen.problem for seen in found if seen.problem])
    print(describe(manifest, url))
    size = f"{manifest.resolution}x{manifest.resolution}, {manifest.channels} channels"
    print(f"{size}; mirroring {'allowed' if manifest.flip else 'not allowed'}; {len(manifest.class_names)} classes")
    for split in manifest.splits:
        counts = np.sum([seen.labels for seen in found if seen.look.split == split], axis=0)
        print(histogram(split, manifest.class_names, counts))
    images = [image for seen in found for image in seen.images]
    buffer = io.BytesIO()
    Image.fromarray(audit.contact_sheet(images, columns=20)).save(buffer, format="PNG")
    store.write_bytes(options.out, buffer.getvalue())
    print(f"{len(images)} images in {options.out}")


def histogram(split: str, names: Sequence[str], counts: NDArray[np.int64]) -> str:
    """A bar for each class of a split; of many classes only the 10 least and the 10 most frequent."""
    order = list(range(len(names)))
    title = f"{split}: images of each class"
    if len(names) > _BAR:
        ranked = sorted(order, key=lambda label: (counts[label], label))
        order, title = ranked[:10] + ranked[-10:], f"{split}: the 10 rarest and the 10 most frequent classes"
    width = max(len(names[label]) for label in order)
    lines = [
        f"  {names[label]:{width}s} {counts[label]:>9,} {'#' * round(_BAR * counts[label] / max(1, counts.max()))}"
        for label in order
    ]
    return "\n".join([title, *lines])


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
