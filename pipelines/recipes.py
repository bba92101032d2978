"""Named configurations: a recipe is a function that returns a whole `Config`, its docstring what to expect of it."""

from collections.abc import Callable
from dataclasses import replace

from bcm.networks import NCSNppConfig
from bcm.schedule import ScheduleConfig
from bcm.training import TrainConfig
from cluster.scaling import ScalingOptions
from pipelines.config import Config, ConfigError, nearest


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
        train=TrainConfig(iterations=2500, batch_size=128, learning_rate=3e-3, ema_rate=0.998),
        scaling=ScalingOptions(workers=2),
        checkpoint_every=500,
        log_every=25,
    )


def digits_smoke() -> Config:
    """The digits recipe cut to a few steps of a narrower network, to see every part work.

    Expected: nothing of the images. Some seconds on 2 CPU cores.
    Command: python -m pipelines.train digits-smoke
    """
    config = digits()
    return replace(
        config,
        recipe="digits-smoke",
        network=replace(config.network, width=8),
        train=replace(config.train, iterations=40, batch_size=32),
        checkpoint_every=20,
        log_every=5,
    )


def cifar10_bcm() -> Config:
    """BCM from scratch on CIFAR-10 (Table 1, left; Appendix C.1).

    Expected FID at NFE 1, 2, 3, 4: 3.10, 2.39, 2.50, 2.29. 409.6M images; several days on 8 GPUs.
    Command: python -m pipelines.train cifar10-bcm --storage s3://BUCKET/runs --data s3://BUCKET/cifar10
    """
    return Config(
        recipe="cifar10-bcm",
        dataset="cifar10",
        network=NCSNppConfig(),
        schedule=ScheduleConfig(),
        train=TrainConfig(),
        scaling=ScalingOptions(workers=8, gpu=True),
    )


def cifar10_bcm_smoke() -> Config:
    """The CIFAR-10 recipe on a narrow network for a handful of steps on CPU, to see every part work.

    Expected: nothing of the images. About a minute on 2 CPU cores, after `python -m pipelines.prepare cifar10`.
    Command: python -m pipelines.train cifar10-bcm-smoke
    """
    config = cifar10_bcm()
    return replace(
        config,
        recipe="cifar10-bcm-smoke",
        network=replace(config.network, width=16, blocks=1),
        train=replace(config.train, iterations=8, batch_size=16),
        scaling=ScalingOptions(workers=2),
        checkpoint_every=4,
        log_every=1,
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "digits": digits,
    "digits-smoke": digits_smoke,
    "cifar10-bcm": cifar10_bcm,
    "cifar10-bcm-smoke": cifar10_bcm_smoke,
}


def recipe(name: str) -> Config:
    """The config of a recipe; an unknown name is a `ConfigError` that names the nearest."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe '{name}': {nearest(name, list(RECIPES))}")
    return RECIPES[name]()
