"""The smoke form of a recipe: every part of it at work on two CPU cores, in seconds instead of days."""

from dataclasses import dataclass, replace

from bcm.networks import ADMConfig
from bcm.schedule import ScheduleConfig
from cluster.options import ScalingOptions
from pipelines.config import Config


@dataclass(frozen=True, kw_only=True)
class Size:
    """How small the smoke forms of a data set's recipes are."""

    width: int
    """Channels of the first level."""
    batch_size: int
    """Images per step over both workers."""
    iterations: int
    """Steps, more or less: each stage of a listed curriculum keeps at least one."""


SIZES = {
    "digits": Size(width=8, batch_size=32, iterations=40),
    "images": Size(width=16, batch_size=16, iterations=16),
    "cifar10": Size(width=16, batch_size=16, iterations=8),
    "ffhq64": Size(width=16, batch_size=4, iterations=8),
    "lsun-bedroom256": Size(width=8, batch_size=2, iterations=16),
    "imagenet64": Size(width=32, batch_size=8, iterations=8),
}


def smoke(config: Config) -> Config:
    """The same architecture, objective, curriculum and switches: less width, depth, images and steps, on two CPUs."""
    size = SIZES.get(config.dataset, SIZES["images"])
    # One block a level, two for the deep forms; all levels, and attention where it was.
    narrow = {"width": size.width, "blocks": max(1, config.network.blocks // 3)}
    if isinstance(config.network, ADMConfig):
        narrow["head_channels"] = size.width
    schedule = scaled(config.schedule, size.iterations)
    iterations = sum(schedule.curriculum_steps) or size.iterations
    return replace(
        config,
        recipe=f"{config.recipe}-smoke",
        network=replace(config.network, **narrow),
        schedule=schedule,
        train=replace(config.train, iterations=iterations, batch_size=size.batch_size),
        scaling=ScalingOptions(workers=2),
        checkpoint_every=(iterations + 1) // 2,
        log_every=max(1, iterations // 8),
    )


def scaled(schedule: ScheduleConfig, iterations: int) -> ScheduleConfig:
    """Listed stages in the same proportions, as near as whole steps allow, for about this many iterations."""
    total = sum(schedule.curriculum_steps)
    steps = tuple(max(1, round(count * iterations / total)) for count in schedule.curriculum_steps)
    return replace(schedule, curriculum_steps=steps)
