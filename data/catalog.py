"""Facts of each data set, written once."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from data.errors import DataError


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What is known of a data set before any of it is read.

    Attributes:
        name: The name used in commands, manifests and recipes.
        resolution: Height and width in pixels (images are square).
        channels: 1 (grey) or 3 (RGB).
        splits: Number of images of each split, as published.
        class_names: Name of each label, in label order; a folder of class folders brings its own.
        flip: Whether a mirrored image is as likely as the image itself.
        source_note: Where the images come from.
    """

    name: str
    resolution: int
    channels: int
    splits: Mapping[str, int]
    class_names: tuple[str, ...]
    flip: bool
    source_note: str


_DIGITS = DatasetFacts(
    name="digits",
    resolution=8,
    channels=1,
    splits=MappingProxyType({"train": 1500, "test": 297}),
    class_names=tuple(str(digit) for digit in range(10)),
    flip=False,
    source_note="scikit-learn's load_digits: 1,797 scans of handwritten digits (UCI optdigits), shipped with it",
)

_CIFAR10 = DatasetFacts(
    name="cifar10",
    resolution=32,
    channels=3,
    splits=MappingProxyType({"train": 50_000, "test": 10_000}),
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    flip=True,
    source_note="CIFAR-10 (Krizhevsky, 2009), cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
)

_FASHION_MNIST = DatasetFacts(
    name="fashion-mnist",
    resolution=28,
    channels=1,
    splits=MappingProxyType({"train": 60_000, "test": 10_000}),
    class_names=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    flip=False,
    source_note="Fashion-MNIST (Xiao et al., 2017): the four files *-ubyte.gz from "
    "https://github.com/zalandoresearch/fashion-mnist, or /usr/share/datasets/fashion-mnist of Debian's package "
    "dataset-fashion-mnist",
)

_IMAGENET64 = DatasetFacts(
    name="imagenet64",
    resolution=64,
    channels=3,
    splits=MappingProxyType({"train": 1_281_167, "test": 50_000}),
    class_names=tuple(str(number) for number in range(1, 1001)),
    flip=True,
    source_note="ImageNet (Russakovsky et al., 2015) at 64 px: the npz batches of Chrabaszcz et al. (2017), "
    "https://image-net.org/download-images, whose classes are numbered from 1; or ImageNet's class folders",
)

_FFHQ64 = DatasetFacts(
    name="ffhq64",
    resolution=64,
    channels=3,
    splits=MappingProxyType({"train": 69_000, "test": 1_000}),
    class_names=("face",),
    flip=True,
    source_note="FFHQ (Karras et al., 2019), https://github.com/NVlabs/ffhq-dataset: the PNG files of any size; "
    "the last 1,000 are the test split",
)

_LSUN_BEDROOM256 = DatasetFacts(
    name="lsun-bedroom256",
    resolution=256,
    channels=3,
    splits=MappingProxyType({"train": 3_033_042, "test": 300}),
    class_names=("bedroom",),
    flip=True,
    source_note="LSUN bedroom (Yu et al., 2015), https://github.com/fyu/lsun: bedroom_train_lmdb and bedroom_val_lmdb",
)

DATASETS: Mapping[str, DatasetFacts] = MappingProxyType(
    {known.name: known for known in (_DIGITS, _CIFAR10, _FASHION_MNIST, _IMAGENET64, _FFHQ64, _LSUN_BEDROOM256)}
)


def facts(name: str) -> DatasetFacts:
    """Facts of the data set called `name`; an unknown name is a DataError that names the nearest known one."""
    if name in DATASETS:
        return DATASETS[name]
    nearest = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise DataError(f"unknown data set {name!r}: {hint}Known: {', '.join(sorted(DATASETS))}")
