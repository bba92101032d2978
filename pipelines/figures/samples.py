"""Rows of a grid that show what a model does: new images; held-out images, their noise, their reconstructions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch

from bcm import inference
from bcm.inference import Toolkit, check_task, steps_for
from bcm.timesteps import Inversion, TimeSteps
from bcm.types import Images
from pipelines.figures.grid import Row, noise_as_image

Task = Literal["generate", "invert", "all"]
"""New images, inverted images, or everything the model does."""

BATCH = 250
"""Images of a network call."""


def steps_to_draw(toolkit: Toolkit, task: Task, nfe: int = 0) -> list[TimeSteps]:
    """The time steps that `task` is drawn with: of `nfe` network calls, 0 for the most; every NFE for `all`.

    `all` inverts with the NFE of the paper's pictures, 4, where the model has it, and leaves inversion out of a model
    that has no time steps for it.
    """
    if task != "all":
        return [steps_for(toolkit, "sample" if task == "generate" else "invert", nfe)]
    check_task(toolkit, "sample")
    sampling = [steps for steps in toolkit.schedules.values() if not isinstance(steps, Inversion)]
    inverting = {steps.nfe: steps for steps in toolkit.schedules.values() if isinstance(steps, Inversion)}
    chosen = [inverting[4 if 4 in inverting else max(inverting)]] if inverting else []
    return [*sorted(sampling, key=lambda steps: steps.nfe), *chosen]


def generated(toolkit: Toolkit, nfe: int, seeds: Sequence[int], label: int | None = None) -> Row:
    """New images, all of class `label` where it is given; else the image of seed s has class s modulo the classes."""
    classes = toolkit.network.classes
    labels = [seed % classes for seed in seeds] if classes else None
    if label is not None:
        labels = [label] * len(seeds)
    return Row(f"samples\nNFE {nfe}", inference.generate(toolkit, seeds, nfe, labels), labels)


def inverted(toolkit: Toolkit, x: Images, labels: Sequence[int], nfe: int, seeds: Sequence[int]) -> list[Row]:
    """The images `x` (B, C, H, W), their noise and their reconstructions."""
    known = labels if toolkit.network.classes else None
    noise = inference.invert(toolkit, x, seeds, nfe, known)
    T = steps_for(toolkit, "invert", nfe).times[-1]
    return [
        Row("held-out images", x, known),
        Row(f"their noise\nNFE {nfe}", noise_as_image(noise, T), known),
        Row("reconstructions\nNFE 1", inference.reconstruct(toolkit, x, seeds, nfe, known), known),
    ]


def drawn(
    toolkit: Toolkit,
    steps_list: Sequence[TimeSteps],
    seeds: range,
    *,
    label: int | None = None,
    x: Images | None = None,
    labels: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[range, list[Row]]]:
    """The rows of all time steps, batch by batch of the seeds, each with its seeds.

    Args:
        toolkit: the model.
        steps_list: time steps, from `steps_to_draw`.
        seeds: one for each image.
        label: class of all new images, if they are all of one.
        x: the images to invert (B, C, H, W) in [-1, 1], one for each seed; needed where time steps invert.
        labels: their labels.
        progress: called after each batch but a single one with the images that were made and those there are.
    """
    for start in range(0, len(seeds), BATCH):
        batch, rows = seeds[start : start + BATCH], list[Row]()
        for steps in steps_list:
            if isinstance(steps, Inversion):
                assert x is not None
                here = slice(start, start + BATCH)
                rows += inverted(toolkit, x[here], labels[here], steps.nfe, batch)
            else:
                rows.append(generated(toolkit, steps.nfe, batch, label))
        yield batch, rows
        if progress is not None and len(seeds) > BATCH:
            progress(start + len(batch), len(seeds))


def joined(batches: Iterable[tuple[range, Sequence[Row]]]) -> list[Row]:
    """The rows of all batches as one."""
    parts = zip(*(rows for _, rows in batches), strict=True)
    return [Row(row[0].caption, torch.cat([each.images for each in row])) for row in parts]
