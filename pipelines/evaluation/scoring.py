"""What a model is worth: sample and reconstruction scores, computed as Ray tasks that merge."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from bcm import inference
from bcm.inference import Toolkit
from bcm.metrics import Moments, frechet_distance, mse
from bcm.types import Images, from_uint8
from data.cache import CachedSplit

BATCH = 250
"""Images per network call."""
PARTS = 8
"""Tasks that the samples of one score are shared among, always the same, so that it does not depend on the cluster."""
FEATURES = 3072
"""Most features of the pixel Frechet distance, those of a CIFAR-10 image; larger images are averaged down to fit."""
LABELLED_PIXELS = 64
"""Largest image, in values, for which a classifier on raw pixels is trained to see whether labels are kept."""

Labeller = Callable[[Images], np.ndarray]


@dataclass(frozen=True)
class Held:
    """The images a model is measured against."""

    train: Moments
    """Pixel moments of the training images."""
    test: CachedSplit
    labeller: Labeller | None
    """Predicts labels from pixels; None for large images."""


def pixels(x: Images) -> Tensor:
    """Pixels in [0, 1], clamped, flattened to (B, D): the features of the pixel Frechet distance.

    Images of more than `FEATURES` values are halved, by averages of 2x2 pixels, until they fit.
    """
    x = (x.clamp(-1, 1) + 1) / 2
    while x[0].numel() > FEATURES:
        x = avg_pool2d(x, 2)
    return x.flatten(1)


def images_of(split: CachedSplit, start: int = 0, stop: int | None = None) -> Images:
    """Images of a split, (B, C, H, W) in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.array(split.images[start:stop])))


def merged(moments: Iterable[Moments]) -> Moments:
    """The moments of all images together; one (D, D) matrix is held beside the sum."""
    return reduce(add, moments)


def moments_of(split: CachedSplit) -> Moments:
    """Pixel moments of a split."""
    return merged(Moments.of(pixels(images_of(split, i, i + BATCH))) for i in range(0, len(split.labels), BATCH))


def held(train: CachedSplit, test: CachedSplit) -> Held:
    """Prepare the comparison with real images."""
    small = train.images[0].size <= LABELLED_PIXELS
    return Held(moments_of(train), test, _classifier(train) if small else None)


def _classifier(train: CachedSplit) -> Labeller:
    from sklearn.svm import SVC

    machine = SVC(C=10).fit(pixels(images_of(train)).numpy(), train.labels)
    return lambda x: machine.predict(pixels(x).numpy())


def sample_moments(toolkit: Toolkit, seeds: Sequence[int], nfe: int) -> Moments:
    """Pixel moments of the samples of these seeds, made batch by batch."""
    classes = toolkit.network.classes

    def part(batch: Sequence[int]) -> Moments:
        labels = [seed % classes for seed in batch] if classes else None
        return Moments.of(pixels(inference.generate(toolkit, batch, nfe, labels)))

    return merged(part(seeds[start : start + BATCH]) for start in range(0, len(seeds), BATCH))


def sample_distance(found: Moments, train: Moments) -> float:
    """Frechet distance of samples; infinite if any of them is not finite."""
    return frechet_distance(found, train) if found.total.isfinite().all() else math.inf


def reconstruction(toolkit: Toolkit, batch: CachedSplit, first: int, nfe: int, whole: bool) -> tuple[Tensor, Images]:
    """Squared errors (B,) of the reconstructions of images `first` and on; the reconstructions, if `whole`."""
    x, seeds = images_of(batch), range(first, first + len(batch.labels))
    found = inference.reconstruct(toolkit, x, seeds, nfe, batch.labels.tolist() if toolkit.network.classes else None)
    return mse(found, x), found if whole else found[:0]


def score_samples(
    toolkit: Toolkit, train: Moments, nfes: Sequence[int], count: int, first: int = 0
) -> dict[int, float]:
    """Pixel Frechet distance between `count` samples, of seeds from `first` on, and the training images, by NFE."""
    import ray

    task, model = ray.remote(sample_moments), ray.put(toolkit)
    shares = [share.tolist() for share in np.array_split(np.arange(first, first + count), PARTS) if len(share)]
    distances: dict[int, float] = {}
    for nfe in nfes:
        moments: list[Moments] = ray.get([task.remote(model, share, nfe) for share in shares])
        distances[nfe] = sample_distance(merged(moments), train)
    return distances


def score_reconstructions(
    toolkit: Toolkit, real: Held, nfes: Sequence[int], count: int | None = None
) -> dict[str, float]:
    """Mean squared error in [0, 1] and share of kept labels over the first `count` test images, by inversion NFE."""
    import ray

    task, model = ray.remote(reconstruction), ray.put(toolkit)
    count = len(real.test.labels[:count])
    starts = range(0, count, BATCH)
    parts = [ray.put(_part(real.test, start, min(start + BATCH, count))) for start in starts]
    before = real.labeller(images_of(real.test, 0, count)) if real.labeller else None
    scores: dict[str, float] = {}
    for nfe in nfes:
        refs = [
            task.remote(model, part, i, nfe, real.labeller is not None) for i, part in zip(starts, parts, strict=True)
        ]
        errors, found = zip(*ray.get(refs), strict=True)
        scores[f"mse_nfe{nfe}"] = float(torch.cat(errors).mean())
        if real.labeller:
            after = real.labeller(torch.cat(found).nan_to_num())
            scores[f"labels_kept_nfe{nfe}"] = float(np.mean(after == before))
    return scores


def _part(split: CachedSplit, start: int, stop: int) -> CachedSplit:
    return CachedSplit(images=np.array(split.images[start:stop]), labels=split.labels[start:stop])


def score_model(toolkit: Toolkit, real: Held, samples: int, images: int | None = None) -> dict[str, float]:
    """Every score: Frechet distance of `samples` samples by NFE, over that of the test images too; reconstructions."""
    sampling = sorted(s.nfe for name, s in toolkit.schedules.items() if name.startswith("sample-"))
    inverting = sorted(s.nfe for name, s in toolkit.schedules.items() if name.startswith("invert-"))
    test = frechet_distance(moments_of(real.test), real.train)
    scores = {"frechet_test": test}
    for nfe, distance in score_samples(toolkit, real.train, sampling, samples).items():
        scores |= {f"frechet_nfe{nfe}": distance, f"frechet_ratio_nfe{nfe}": distance / test}
    return scores | score_reconstructions(toolkit, real, inverting, images)
