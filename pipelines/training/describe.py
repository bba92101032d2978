"""What `--dry-run` of a training prints: the config, and what follows from it."""

import json
from bisect import bisect_right
from collections.abc import Iterator

from bcm import strict
from bcm.cost import step_cost
from bcm.objectives import OBJECTIVES
from bcm.schedule import ScheduleConfig, discretization
from pipelines.config import Config


def describe(config: Config) -> str:
    """The config, the network's size, the cost of a step, the stages of N and the images seen."""
    train, workers = config.train, config.scaling.workers
    cost = step_cost(config.network, train, config.schedule, workers)
    parts = {"weights": cost.weights, "gradients": cost.gradients, "moments": cost.moments, "averages": cost.averages}
    listed = ", ".join(f"{name} {amount(size)}" for name, size in parts.items())
    passes = f"{cost.step_flops / cost.forward_flops:.2f} forward passes of {train.batch_size:,} images"
    stages = ", ".join(f"N={N} from step {k:,}" for k, N in stages_of(train.iterations, config.schedule))
    facts = {
        "parameters": f"{cost.parameters:,}",
        "FLOPs a step": f"{cost.step_flops:.3g}, those of {passes}",
        "memory a worker": f"about {amount(cost.peak)} of tensors: {listed}, the rest activations",
        "images in all": f"{train.iterations * train.batch_size:,}",
        "stages": stages if OBJECTIVES[train.objective].grid else "none, the times are not on a grid",
    }
    lines = [f"{name:17s}{fact}" for name, fact in facts.items()]
    return "\n".join([json.dumps(strict.dump(config), indent=2), *lines])


def stages_of(K: int, schedule: ScheduleConfig) -> Iterator[tuple[int, int]]:
    """The first iteration of each stage of the curriculum, and its N, which grows from stage to stage."""
    k = 0
    while k < K:
        N = discretization(k, K, schedule)
        yield k, N
        k = bisect_right(range(K), N, lo=k, key=lambda k: discretization(k, K, schedule))


def amount(size: int) -> str:
    """Bytes in a unit for people."""
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    return f"{size / unit:.3g} {name}"
