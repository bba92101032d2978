"""Scores computed as Ray tasks over fixed parts of the images, which merge exactly whatever the cluster."""

import math
from collections.abc import Sequence
from functools import reduce
from operator import add

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bcm import inference
from bcm.inference import Toolkit
from bcm.metrics import Moments, frechet_distance, mse
from bcm.timesteps import Inversion
from bcm.types import Images
from cluster import session
from data.cache import ShardCache
from data.manifest import Manifest
from pipelines.evaluation.features import PIXELS, as_images, pixels
from pipelines.evaluation.reference import Labeller, classifier, moments_of
from pipelines.evaluation.scores import Score

BATCH = 250
"""Images per network call."""
PARTS = 8
"""Tasks that the samples of one score are shared among, always the same, so that it does not depend on the cluster."""


def sample_moments(toolkit: Toolkit, seeds: Sequence[int], nfe: int) -> Moments:
    """Pixel moments of the samples of these seeds, made batch by batch."""
    classes = toolkit.network.classes
    moments: list[Moments] = []
    for start in range(0, len(seeds), BATCH):
        batch = seeds[start : start + BATCH]
        labels = [seed % classes for seed in batch] if classes else None
        moments.append(Moments.of(pixels(inference.generate(toolkit, batch, nfe, labels))))
    return reduce(add, moments)


def sample_distance(samples: Moments, train: Moments) -> float:
    """Frechet distance of samples; infinite if any of them is not finite."""
    return frechet_distance(samples, train) if samples.total.isfinite().all() else math.inf


def reconstruction(
    toolkit: Toolkit, batch: tuple[NDArray[np.uint8], NDArray[np.int64]], first: int, nfe: int, whole: bool
) -> tuple[Tensor, Images]:
    """Squared errors (B,) of the reconstructions of some images; the reconstructions, if `whole`.

    Args:
        toolkit: the model.
        batch: images (B, C, H, W) and their labels.
        first: place of the first one in its split, which is its seed.
        nfe: network calls to invert one.
        whole: whether the reconstructions are wanted.
    """
    images, labels = batch
    x, seeds = as_images(images), range(first, first + len(labels))
    back = inference.reconstruct(toolkit, x, seeds, nfe, labels.tolist() if toolkit.network.classes else None)
    return mse(back, x), back if whole else back[:0]


def score_samples(toolkit: Toolkit, train: Moments, count: int, first: int = 0) -> list[Score]:
    """Pixel Frechet distance between `count` samples, of seeds from `first` on, and the training images, by NFE."""
    import ray

    task, model = ray.remote(num_cpus=1)(sample_moments), ray.put(toolkit)
    parts = [part.tolist() for part in np.array_split(np.arange(first, first + count), PARTS) if len(part)]
    sampling = [steps for steps in toolkit.schedules.values() if not isinstance(steps, Inversion)]
    rows: list[Score] = []
    for steps in sorted(sampling, key=lambda steps: steps.nfe):
        moments: list[Moments] = ray.get([task.remote(model, part, steps.nfe) for part in parts])
        rows.append(
            Score(
                metric="fd-pixels",
                task="sample",
                nfe=steps.nfe,
                value=sample_distance(reduce(add, moments), train),
                error=None,
                count=count,
                seeds=(first, first + count - 1),
                extractor=PIXELS,
                steps=steps,
            )
        )
    return rows


def score_reconstructions(
    toolkit: Toolkit, test: ShardCache, labeller: Labeller | None, count: int | None = None
) -> list[Score]:
    """Mean squared error in [0, 1] and share of kept labels over the first `count` test images, by inversion NFE."""
    import ray

    task, model = ray.remote(num_cpus=1)(reconstruction), ray.put(toolkit)
    ids = np.arange(len(test))[:count]
    starts = range(0, len(ids), BATCH)
    parts = [(ray.put(test.take(ids[start : start + BATCH])), start) for start in starts]
    before = labeller(as_images(test.take(ids)[0])) if labeller else None
    inverting = [steps for steps in toolkit.schedules.values() if isinstance(steps, Inversion)]
    rows: list[Score] = []
    for steps in sorted(inverting, key=lambda steps: steps.nfe):
        answers = ray.get([task.remote(model, *part, steps.nfe, labeller is not None) for part in parts])
        errors, images = (torch.cat(each) for each in zip(*answers, strict=True))
        values = {"mse": (errors.mean(), errors.std() / len(ids) ** 0.5)}
        if labeller:
            kept = torch.from_numpy(labeller(images.nan_to_num()) == before).double()
            values["labels-kept"] = (kept.mean(), (kept.mean() * (1 - kept.mean()) / len(ids)).sqrt())
        rows += [
            Score(
                metric="mse" if metric == "mse" else "labels-kept",
                task="reconstruct",
                nfe=steps.nfe,
                value=float(value),
                error=float(error),
                count=len(ids),
                seeds=(0, len(ids) - 1),
                extractor=None,
                steps=steps,
            )
            for metric, (value, error) in values.items()
        ]
    return rows


def score_model(
    toolkit: Toolkit, data: str, manifest: Manifest, samples: int, images: int | None = None
) -> tuple[Score, ...]:
    """Every score: of the test images themselves, of `samples` samples by NFE, of reconstructions.

    The set at the URL `data` is read, where it is not cached, before Ray is needed.
    """
    train, test = (ShardCache(data, manifest, split) for split in ("train", "test"))
    moments, labeller = moments_of(train), classifier(train, manifest)
    real = Score(
        metric="fd-pixels",
        task="real",
        nfe=0,
        value=frechet_distance(moments_of(test), moments),
        error=None,
        count=len(test),
        seeds=None,
        extractor=PIXELS,
        steps=None,
    )
    with session.connect(worker_logs=False):
        sampled = score_samples(toolkit, moments, samples)
        return (real, *sampled, *score_reconstructions(toolkit, test, labeller, images))
