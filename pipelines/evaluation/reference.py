"""The real images that a model is measured against, and whether they fit it."""

from collections.abc import Callable
from functools import reduce
from operator import add

import numpy as np

from bcm.metrics import Moments
from bcm.networks import NetworkConfig
from bcm.types import Images
from data.cache import ShardCache
from data.manifest import Manifest, check_shards, load_manifest
from pipelines.errors import ConfigError
from pipelines.evaluation.features import as_images, pixels

LABELLED_PIXELS = 64
"""Largest image, in values, for which a classifier on raw pixels is trained to see whether labels are kept."""

Labeller = Callable[[Images], np.ndarray]
"""Predicts labels from pixels."""


def manifest_for(network: NetworkConfig, data: str) -> Manifest:
    """The manifest of the data at the URL `data`, which must be whole and fit the network, else a `ConfigError`."""
    manifest = load_manifest(data)
    if (manifest.resolution, manifest.channels) != (network.resolution, network.image_channels):
        raise ConfigError(
            f"the model makes images of {network.resolution} px and {network.image_channels} channels, but {data} "
            f"holds {manifest.resolution} px and {manifest.channels} channels. Give --data that fits, or the network "
            "options that do."
        )
    if network.classes not in (0, len(manifest.class_names)):
        raise ConfigError(
            f"network.classes is {network.classes}, but {data} has {len(manifest.class_names)} classes. "
            "Give --data that fits."
        )
    check_shards(data, manifest)
    return manifest


def held_out(network: NetworkConfig, data: str, count: int) -> tuple[Images, list[int]]:
    """The first `count` held-out images at the URL `data`, (B, C, H, W) in [-1, 1], and their labels.

    More than there are is a `ConfigError`.
    """
    cache = ShardCache(data, manifest_for(network, data), "test")
    if count > len(cache):
        raise ConfigError(f"{data} holds {len(cache)} held-out images, fewer than {count}. Give a smaller --count.")
    images, labels = cache.take(np.arange(count))
    return as_images(images), labels.tolist()


def moments_of(split: ShardCache) -> Moments:
    """Pixel moments of a split; one (D, D) matrix is held beside the sum."""
    return reduce(add, (Moments.of(pixels(as_images(images))) for images, _ in split.shards()))


def classifier(train: ShardCache, manifest: Manifest) -> Labeller | None:
    """A support vector machine on the pixels of the training images; None for more than `LABELLED_PIXELS` values."""
    if manifest.channels * manifest.resolution**2 > LABELLED_PIXELS:
        return None
    from sklearn.svm import SVC

    images, labels = train.take(np.arange(len(train)))
    machine = SVC(C=10).fit(pixels(as_images(images)).numpy(), labels)
    return lambda x: machine.predict(pixels(x).numpy())
