"""Official sources -> shards and manifest in storage."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from data import storage
from data.catalog import DatasetFacts, facts
from data.errors import DataError
from data.manifest import MANIFEST_NAME, Manifest
from data.shards import SAMPLES_PER_SHARD, Sample, load_manifest, shard_problems, write_manifest, write_split
from data.sources import cifar10, digits

Progress = Callable[[str, int, int], None]
"""Called with the split, the images written so far, and the images of the split."""

_PROGRESS_EVERY = 500


def prepare(
    name: str,
    source: str | None,
    to: str,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    progress: Progress | None = None,
) -> Manifest:
    """Writes every split of a data set, then its manifest, under the URL `to`.

    If the whole set is there already, nothing is written and `progress` is never called; `prepared` tells beforehand.

    Args:
        name: Name in the catalog.
        source: For cifar10 the archive (local or URL) or the unpacked folder; None for digits.
        to: Any storage URL; another data set there is a DataError.
        samples_per_shard: Samples in each shard but the last.
        progress: Called every 500 images and at the end of each split.
    """
    known = facts(name)
    if (found := prepared(name, to, samples_per_shard=samples_per_shard)) is not None:
        return found
    with _reader(known, source) as read:
        storage.check_writable(to)
        # Without its manifest the set does not count as whole until the last line.
        storage.remove(storage.join(to, MANIFEST_NAME))
        splits = {
            split: write_split(
                to, split, _counted(read(split), known, split, progress), samples_per_shard=samples_per_shard
            )
            for split in known.splits
        }
    manifest = Manifest(
        name=known.name,
        resolution=known.resolution,
        channels=known.channels,
        class_names=known.class_names,
        flip=known.flip,
        splits=splits,
    )
    write_manifest(to, manifest)
    return manifest


def prepared(name: str, to: str, *, samples_per_shard: int = SAMPLES_PER_SHARD) -> Manifest | None:
    """The manifest at `to` if this very set is there with every shard; None if it is absent or incomplete.

    A different set at `to` is a DataError, so nothing is ever overwritten by mistake.
    """
    known = facts(name)
    if not storage.exists(storage.join(to, MANIFEST_NAME)):
        return None
    found = load_manifest(to)
    wanted = {
        "name": known.name,
        "resolution": known.resolution,
        "channels": known.channels,
        "class_names": known.class_names,
        "flip": known.flip,
        "images": dict(known.splits),
        "samples per shard": min(samples_per_shard, max(known.splits.values())),
    }
    actual = {
        "name": found.name,
        "resolution": found.resolution,
        "channels": found.channels,
        "class_names": found.class_names,
        "flip": found.flip,
        "images": {split: part.count for split, part in found.splits.items()},
        "samples per shard": max(shard.count for part in found.splits.values() for shard in part.shards),
    }
    for fact, value in wanted.items():
        if actual[fact] != value:
            raise DataError(
                f"{to} holds a different data set: its {fact} is {actual[fact]!r}, not {value!r}. "
                "Choose another URL, or remove that set first."
            )
    return None if shard_problems(to, found) else found


@contextmanager
def _reader(known: DatasetFacts, source: str | None) -> Iterator[Callable[[str], Iterator[Sample]]]:
    """A function from a split to its samples."""
    if known.name == "digits":
        if source is not None:
            raise DataError(
                f"digits comes with scikit-learn and takes no source, but {source!r} was given: leave it out"
            )
        yield digits.samples
    elif known.name == "cifar10":
        if source is None:
            raise DataError(
                "cifar10 needs a source: the path or URL of cifar-10-python.tar.gz or its unpacked folder, "
                f"for example {cifar10.DOWNLOAD_URL}"
            )
        with cifar10.unpacked(source) as folder:
            yield partial(cifar10.samples, source=str(folder))
    else:
        raise DataError(f"data set {known.name!r} has facts but no source")


def _counted(samples: Iterator[Sample], known: DatasetFacts, split: str, progress: Progress | None) -> Iterator[Sample]:
    """The samples, with progress told and their number checked against the facts."""
    total, done = known.splits[split], 0
    for done, sample in enumerate(samples, start=1):
        yield sample
        if progress is not None and (done % _PROGRESS_EVERY == 0 or done == total):
            progress(split, done, total)
    if done != total:
        raise DataError(
            f"the source gave {done} {split} images of {known.name}, but there are {total}: check the source"
        )
