"""Recipes for FFHQ-64 and LSUN Bedroom-256 (Appendix C.1), which the paper calls demonstrations, not tuned."""

from dataclasses import replace

from bcm.networks import NCSNppConfig
from bcm.schedule import ScheduleConfig
from pipelines.config import Config
from pipelines.recipes.cifar10 import cifar10_bcm


def ffhq64_bcm() -> Config:
    """BCM from scratch on FFHQ-64 (Appendix C.1), the model of Fig. 9, 20 and 24.

    Expected: interpolations and inpainting like those figures; the paper states no FID.
    Hardware: 16 H100; about 53 hours for 204.8M images.
    Command: python -m pipelines.train ffhq64-bcm --storage s3://BUCKET/runs --data s3://BUCKET/ffhq64
    """
    config = cifar10_bcm()
    return replace(
        config,
        recipe="ffhq64-bcm",
        dataset="ffhq64",
        network=replace(config.network, resolution=64),
        train=replace(config.train, batch_size=512),
        scaling=replace(config.scaling, workers=16),
    )


def lsun_bedroom256_bcm() -> Config:
    """BCM from scratch on LSUN Bedroom-256 with uneven stages (Appendix C.1), the model of Fig. 9, 21 and 25.

    Expected: interpolations and inpainting like those figures; the paper states no FID.
    Hardware: 16 H100; about 45 hours for 53.8M images.
    Command: python -m pipelines.train lsun-bedroom256-bcm --storage s3://BUCKET/runs --data s3://BUCKET/bedroom256
    """
    config = cifar10_bcm()
    return replace(
        config,
        recipe="lsun-bedroom256-bcm",
        dataset="lsun-bedroom256",
        network=NCSNppConfig(
            resolution=256,
            channel_mult=(1, 1, 2, 2, 2, 2, 2),
            blocks=2,
            dropout=0.2,
            progressive="output_skip",
            progressive_input="input_skip",
        ),
        schedule=ScheduleConfig(
            curriculum_N=(11, 21, 41, 81, 161, 321, 641, 1281),
            curriculum_steps=(75_000, 75_000, 60_000, 60_000, 45_000, 45_000, 30_000, 30_000),
        ),
        train=replace(config.train, iterations=420_000, batch_size=128),
        scaling=replace(config.scaling, workers=16),
    )
