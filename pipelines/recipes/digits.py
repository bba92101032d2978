"""Recipes for the 8x8 digits, which a laptop trains in minutes."""

from dataclasses import replace

from bcm.networks import NCSNppConfig
from bcm.schedule import ScheduleConfig
from bcm.training import TrainConfig
from cluster.options import ScalingOptions
from pipelines.config import Config


def digits() -> Config:
    """BCM from scratch on the 8x8 digits, for a laptop; with the wide law of n' (docs/log.md).

    Expected: reconstruction MSE at 4 NFE below 0.006, labels kept above 95 %, one-step Frechet distance below 1.5 times
    that of the test images. About five minutes on 2 CPU cores.
    Command: python -m pipelines.train digits
    """
    return Config(
        recipe="digits",
        dataset="digits",
        network=NCSNppConfig(
            image_channels=1, resolution=8, width=16, channel_mult=(1, 1), blocks=1, attention=(), dropout=0.0
        ),
        schedule=ScheduleConfig(s1=80, pairs="wide"),
        time_steps="cifar10",
        train=TrainConfig(iterations=2500, batch_size=128, learning_rate=3e-3, ema_rates=(0.998,)),
        scaling=ScalingOptions(workers=2),
        checkpoint_every=500,
        log_every=25,
    )


def digits_ict() -> Config:
    """A consistency model (iCT) of the 8x8 digits: what digits-finetune starts from.

    Expected: one-step samples like those of digits, and no inversion; measured at half this length alone (docs/log.md),
    where both stand at 3.3 to 4.0 times the test images' Frechet distance. About two minutes on 2 CPU cores, by its
    cost: 4 forward passes an image where digits takes 9.
    Command: python -m pipelines.train digits-ict
    """
    config = digits()
    return replace(
        config,
        recipe="digits-ict",
        network=replace(config.network, times=1),
        time_steps="ct-cifar10",
        train=replace(config.train, objective="ct"),
    )


def digits_finetune() -> Config:
    """BCM fine-tuned from digits-ict, as the paper does on ImageNet-64 (Section 3.2), in half the steps of digits.

    Expected, from an iCT of half the length of digits-ict: one-step Frechet distance 1.3 times that of the test images,
    reconstruction MSE at 4 NFE 0.005 (docs/log.md). About three minutes on 2 CPU cores, by its number of steps.
    Command: python -m pipelines.train digits-finetune --init runs/NAME
    """
    config = digits()
    return replace(
        config,
        recipe="digits-finetune",
        network=replace(config.network, embedding="projected"),
        schedule=replace(config.schedule, curriculum_N=(41, 61, 81), curriculum_steps=(750, 250, 250)),
        train=replace(config.train, iterations=1250),
        finetunes=True,
    )
