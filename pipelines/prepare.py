"""`python -m pipelines.prepare NAME --source URL --to URL`: images into WebDataset shards; also `verify`, `inspect`."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from cluster.tasks import in_parallel
from data import store
from data.errors import DataError
from data.prepare import Choices, audit, dry_run, prepare
from pipelines.cli import AT_TOP_LEVEL, Bar, Name, Url, durable, parse, run_command

RUN = partial(in_parallel, user_error=DataError)
"""Where shards are read and written: a few here, many as Ray tasks."""


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Write a data set as WebDataset shards and a manifest, to any storage URL. The same command goes on after a kill.

    `prepare verify URL` checks every byte and image of a set, `prepare inspect URL` shows what is in it.
    """

    name: Name
    """digits, cifar10, fashion-mnist, imagenet64, ffhq64, lsun-bedroom256, or a name of your own for your images."""
    to: str | None = None
    """URL of the folder to write; by default runs/data/NAME."""
    source: str | None = None
    """Path or URL of the archive, folder, zip file, lmdb or tars; digits need none."""
    choices: Annotated[Choices, AT_TOP_LEVEL] = field(default_factory=Choices)
    anonymous: bool = False
    """Read --source, an s3:// URL of a public bucket, without keys."""
    dry_run: bool = False
    """Look at the source and the place, print what would be made and how long it would take, and write nothing."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Compare every byte of a set with its manifest and decode every image; exit code 2 and a list of what is wrong."""

    url: Url
    """URL of the folder with the manifest."""
    bytes_only: bool = False
    """Compare the bytes and decode no image."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Print counts, sizes and a histogram of the labels of a set, and draw a contact sheet of its images."""

    url: Url
    """URL of the folder with the manifest."""
    out: str = "runs/contact-sheet.png"
    """Picture to write: 100 images of each split."""


def write(options: PrepareOptions, bar: Bar) -> str:
    """Prepare a set, or say what that would make."""
    to = durable(options.to or f"runs/data/{options.name}", "--to")
    source = durable(options.source, "--source") if options.source else None
    source = store.anonymous(source or "") if options.anonymous else source
    if options.dry_run:
        return "\n".join(dry_run(options.name, source, to, choices=options.choices, run=RUN))
    return audit.describe(prepare(options.name, source, to, choices=options.choices, progress=bar, run=RUN), to)


def main(argv: Sequence[str]) -> None:
    """The command line."""
    with closing(Bar("")) as bar:
        match list(argv):
            case ["verify", *rest]:
                asked = parse(VerifyOptions, rest, "prepare verify")
                said = audit.verified(durable(asked.url, "URL"), decode=not asked.bytes_only, run=RUN, progress=bar)
            case ["inspect", *rest]:
                asked = parse(InspectOptions, rest, "prepare inspect")
                said = audit.inspected(durable(asked.url, "URL"), asked.out, run=RUN, progress=bar)
            case _:
                said = write(parse(PrepareOptions, argv, "prepare"), bar)
    print(said)


if __name__ == "__main__":
    run_command(main)
