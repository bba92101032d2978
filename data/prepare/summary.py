"""What a set is made of, for people: splits, classes, images of each; and what making it would take."""

import os
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from data import store
from data.prepare.layout import Layout
from data.prepare.pack import Sample, pack
from data.prepare.write import samples_of

_MOST_NAMED = 10
_TRIED_SECONDS = 2.0
_MOST_TRIED = 256


def class_counts(names: Sequence[str], counts: Sequence[int]) -> str:
    """How many images of each class there are, of many classes of the first and last few."""
    told = [
        f"{ascii(name)[1:-1] if not name.isprintable() else name} {count:,}"
        for name, count in zip(names, counts, strict=True)
    ]
    if len(told) > _MOST_NAMED:
        told = [*told[:4], "...", *told[-3:], f"(each {min(counts):,} to {max(counts):,})"]
    return ", ".join(told).replace("..., ", "... ").replace(", ...", " ...").replace(", (", " (")


def describe(layout: Layout) -> str:
    """A line for each split, and where the labels come from."""
    classes = len(layout.class_names)
    lines = [
        f"{split:5s} {sum(counts):>9,} images, {classes:,} class{'es' if classes > 1 else ''}: "
        + class_counts(layout.class_names, counts)
        for split, counts in layout.labels.items()
    ]
    return "\n".join([*lines, f"labels: {layout.labels_from or 'none; all images are of one class'}"])


def forecast(layout: Layout, to: str) -> str:
    """What would be written, and how long it would take: the first images of each split are made to see.

    An image that cannot be used, and a place that cannot be written, are a DataError.
    """
    store.check_writable(_existing(to))
    form = layout.form
    size = f"{form.resolution}x{form.resolution} px, {'RGB' if form.channels == 3 else 'grey'}"
    if layout.kept:
        shards = sum(len(found) for found in layout.kept.values())
        return f"would write a manifest of {shards:,} tars that stay as they are, {size}, to {to}: in a moment"
    made, seconds, written = 0, 0.0, 0
    for split in layout.labels:
        first = next(shards for shards in layout.ranges if shards.split == split).only(0, 1)
        began = time.monotonic()
        samples: list[Sample] = []
        for sample in islice(samples_of(first, form), _MOST_TRIED):
            samples.append(sample)
            if time.monotonic() > began + _TRIED_SECONDS:
                break
        written += len(pack(samples, form.encoding)[0])
        seconds += time.monotonic() - began
        made += len(samples)
    total, shards = sum(layout.counts.values()), sum(len(shards.counts) for shards in layout.ranges)
    workers = min(len(layout.ranges), os.cpu_count() or 1)
    return (
        f"would write {shards:,} shards, {size}, {form.encoding}, about {total * written / made / 1e6:,.1f} MB, to "
        f"{to}: in about {_duration(total * seconds / made / workers)} on {workers} of this machine's CPUs"
    )


def _existing(url: str) -> str:
    """The place itself, or on this machine the nearest folder above that exists, so that looking makes none."""
    if not store.is_local(url):
        return url
    place = Path(store.absolute(url))
    return str(next(folder for folder in (place, *place.parents) if folder.exists()))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
