"""Rows of a grid that show what a model does: new images; held-out images, their noise, their reconstructions."""

from collections.abc import Sequence
from typing import Literal

from bcm import inference
from bcm.inference import Toolkit, check_task, steps_for
from bcm.timesteps import Inversion, TimeSteps
from bcm.types import Images
from pipelines.figures.grid import Row, noise_as_image

Task = Literal["generate", "invert", "all"]
"""New images, inverted images, or everything the model does."""


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
    return Row(f"samples\nNFE {nfe}", inference.generate(toolkit, seeds, nfe, labels))


def inverted(toolkit: Toolkit, x: Images, labels: Sequence[int], nfe: int, seeds: Sequence[int]) -> list[Row]:
    """The images `x` (B, C, H, W), their noise and their reconstructions."""
    known = labels if toolkit.network.classes else None
    noise = inference.invert(toolkit, x, seeds, nfe, known)
    T = steps_for(toolkit, "invert", nfe).times[-1]
    return [
        Row("held-out images", x),
        Row(f"their noise\nNFE {nfe}", noise_as_image(noise, T)),
        Row("reconstructions\nNFE 1", inference.reconstruct(toolkit, x, seeds, nfe, known)),
    ]
