"""Recipes for CIFAR-10 (Table 1, left; Appendix C.1)."""

from dataclasses import replace

from bcm.networks import NCSNppConfig
from bcm.schedule import ScheduleConfig
from bcm.training import TrainConfig
from cluster.options import ScalingOptions
from pipelines.config import Config

DEEP = 8
"""Residual blocks a level of the deep networks, twice those of the plain ones."""


def cifar10_bcm() -> Config:
    """BCM from scratch on CIFAR-10 (Table 1, left; Appendix C.1).

    Expected: FID 3.10, 2.39, 2.50, 2.29 at NFE 1, 2, 3, 4 (Table 1, quoted from memory).
    Hardware: 8 H100; about 55 hours for 409.6M images.
    Command: python -m pipelines.train cifar10-bcm --storage s3://BUCKET/runs --data s3://BUCKET/cifar10
    """
    return Config(
        recipe="cifar10-bcm",
        dataset="cifar10",
        network=NCSNppConfig(),
        schedule=ScheduleConfig(),
        time_steps="cifar10",
        train=TrainConfig(),
        scaling=ScalingOptions(workers=8, gpu=True),
    )


def cifar10_bcm_deep() -> Config:
    """BCM-deep from scratch on CIFAR-10: twice the residual blocks (Table 1, left; Appendix C.1).

    Expected: FID 2.64, 2.36, 2.19, 2.07 at NFE 1, 2, 3, 4 (Table 1, quoted from memory).
    Hardware: 8 H100; about 98 hours for 409.6M images.
    Command: python -m pipelines.train cifar10-bcm-deep --storage s3://BUCKET/runs --data s3://BUCKET/cifar10
    """
    config = cifar10_bcm()
    return replace(
        config,
        recipe="cifar10-bcm-deep",
        time_steps="cifar10-deep",
        network=replace(config.network, blocks=DEEP),
        train=replace(config.train, accumulate=2),
    )


def cifar10_ict() -> Config:
    """The consistency model beside BCM on CIFAR-10, iCT (Table 1, left), with the same settings.

    Expected: FID 2.87 at NFE 1 (the paper's own training, Appendix C.3.2); Song and Dhariwal (2024) give 2.83 and 2.46
    at NFE 1 and 2.
    Hardware: 8 H100; about 24 hours for 409.6M images.
    Command: python -m pipelines.train cifar10-ict --storage s3://BUCKET/runs --data s3://BUCKET/cifar10
    """
    config = cifar10_bcm()
    return replace(
        config,
        recipe="cifar10-ict",
        network=replace(config.network, times=1),
        time_steps="ct-cifar10",
        train=replace(config.train, objective="ct"),
    )


def cifar10_ict_deep() -> Config:
    """The deep consistency model on CIFAR-10, iCT-deep: twice the residual blocks (Table 1, left).

    Expected: FID 2.51 and 2.24 at NFE 1 and 2 (Song and Dhariwal, 2024, quoted from memory).
    Hardware: 8 H100; about 44 hours for 409.6M images.
    Command: python -m pipelines.train cifar10-ict-deep --storage s3://BUCKET/runs --data s3://BUCKET/cifar10
    """
    config = cifar10_ict()
    return replace(config, recipe="cifar10-ict-deep", network=replace(config.network, blocks=DEEP))


def cifar10_edm() -> Config:
    """EDM on CIFAR-10, the diffusion model whose inversion Fig. 5 compares with; no consistency model.

    Network, batch, images, learning rate and average are those of Karras et al. (2022); RAdam stands for Adam with
    warm-up, and images are mirrored but not augmented otherwise.

    Expected: FID of about 2 at 35 network calls of EDM's sampler (Karras et al., 2022, with augmentation: 2.01 or
    better); without augmentation somewhat more.
    Hardware: 8 H100; about 9 hours for 200.2M images. EDM's authors report about 2 days on 8 V100.
    Command: python -m pipelines.train cifar10-edm --storage s3://BUCKET/runs --data s3://BUCKET/cifar10
    """
    config = cifar10_bcm()
    return replace(
        config,
        recipe="cifar10-edm",
        time_steps="ct-cifar10",
        network=NCSNppConfig(times=1, fourier_scale=16.0, dropout=0.13),
        train=TrainConfig(
            iterations=391_000, batch_size=512, learning_rate=1e-3, ema_rates=(0.99929,), objective="edm"
        ),
    )
