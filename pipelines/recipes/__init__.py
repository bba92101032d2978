"""Named configurations: a recipe is a function that returns a whole `Config`, its docstring what to expect of it.

The hours in the docstrings are an estimate, not a measurement: the FLOPs that `--dry-run` counts for all steps, at
`FLOPS_PER_GPU`. Workers and micro-batches are chosen so that its memory estimate stays below 70 GB a GPU.
FID is quoted from the literature: its Inception network is not part of this project, which measures in pixels.
"""

from collections.abc import Callable

from data.manifest import Manifest
from pipelines.config import Config
from pipelines.errors import ConfigError, nearest
from pipelines.recipes.cifar10 import (
    cifar10_bcm,
    cifar10_bcm_deep,
    cifar10_edm,
    cifar10_ict,
    cifar10_ict_deep,
)
from pipelines.recipes.digits import digits, digits_finetune, digits_ict
from pipelines.recipes.imagenet64 import imagenet64_bcm, imagenet64_bcm_deep, imagenet64_ict, imagenet64_ict_deep
from pipelines.recipes.images import images
from pipelines.recipes.large import ffhq64_bcm, lsun_bedroom256_bcm
from pipelines.recipes.smoke import smoke as cut

Recipe = Callable[[], Config]

FLOPS_PER_GPU = 1e14
"""What a recipe's hours assume of each GPU in a second: a tenth of an H100's peak in bf16, a fifth of that in TF32."""

OWN_IMAGES = "images"
"""The recipe that follows from the set."""

RECIPES: dict[str, Recipe] = {
    "digits": digits,
    "digits-ict": digits_ict,
    "digits-finetune": digits_finetune,
    OWN_IMAGES: images,
    "cifar10-ict": cifar10_ict,
    "cifar10-ict-deep": cifar10_ict_deep,
    "cifar10-bcm": cifar10_bcm,
    "cifar10-bcm-deep": cifar10_bcm_deep,
    "cifar10-edm": cifar10_edm,
    "ffhq64-bcm": ffhq64_bcm,
    "lsun-bedroom256-bcm": lsun_bedroom256_bcm,
    "imagenet64-ict": imagenet64_ict,
    "imagenet64-ict-deep": imagenet64_ict_deep,
    "imagenet64-bcm": imagenet64_bcm,
    "imagenet64-bcm-deep": imagenet64_bcm_deep,
}


def recipe(name: str, smoke: bool = False, manifest: Manifest | None = None) -> Config:
    """The config of a recipe, or its smoke form; an unknown name is a `ConfigError` that names the nearest.

    `manifest` is that of the set to train on, by which images of one's own decide their config.
    """
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe '{name}': {nearest(name, list(RECIPES))}")
    config = images(manifest) if name == OWN_IMAGES else RECIPES[name]()
    return cut(config) if smoke else config
