"""The recipe for images of one's own: its network follows from the manifest of the set."""

from bcm.networks import NCSNppConfig
from bcm.schedule import ScheduleConfig
from bcm.training import TrainConfig
from cluster.options import ScalingOptions
from data.manifest import Manifest
from pipelines.config import Config

_COARSEST = 7
_ATTENTION = 16


def images(manifest: Manifest | None = None) -> Config:
    """BCM from scratch on images of your own: the set at --data decides resolution, channels and classes.

    Expected: for thousands of images of one kind at 32 to 64 px, samples that look like them; see docs/own-images.md.
    Hardware: 1 H100; about 4 hours for 11.5M images, at 32 px.
    Command: python -m pipelines.train images --data s3://BUCKET/mine --storage s3://BUCKET/runs
    """
    resolution, channels, classes, count = 32, 3, 0, 1024
    if manifest is not None:
        resolution, channels, count = manifest.resolution, manifest.channels, manifest.splits["train"].count
        classes = len(manifest.class_names) if len(manifest.class_names) > 1 else 0
    levels = [resolution]
    while levels[-1] % 2 == 0 and levels[-1] // 2 >= _COARSEST:
        levels.append(levels[-1] // 2)
    return Config(
        recipe="images",
        dataset=manifest.name if manifest else "images",
        network=NCSNppConfig(
            image_channels=channels,
            resolution=resolution,
            channel_mult=(1, *[2] * (len(levels) - 1)),
            blocks=2,
            attention=(_ATTENTION,) if _ATTENTION in levels else (),
            classes=classes,
        ),
        schedule=ScheduleConfig(),
        time_steps="cifar10",
        train=TrainConfig(iterations=44_800, batch_size=min(256, count), learning_rate=2e-4, ema_rates=(0.9995,)),
        scaling=ScalingOptions(workers=1, gpu=True),
    )
