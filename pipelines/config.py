"""The configuration of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bcm.inference import check_schedules
from bcm.networks import NetworkConfig
from bcm.schedule import ScheduleConfig, discretization
from bcm.timesteps import PUBLISHED
from bcm.training import TrainConfig, check_objective
from cluster.options import ScalingOptions
from pipelines.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides what a training run computes."""

    recipe: str
    """Name of the recipe this config started from."""
    dataset: str
    """Name of the data set, as in `pipelines.prepare`."""
    network: NetworkConfig
    """The network F_theta; the recipe decides which kind it is."""
    schedule: ScheduleConfig
    """Time grid, its curriculum, and the law of the times."""
    train: TrainConfig
    """Optimisation."""
    scaling: ScalingOptions
    """Workers; may change when a run is resumed."""
    time_steps: str
    """Published time steps that the model starts with, a name in `bcm.timesteps.PUBLISHED`."""
    window: int = 0
    """Shards among which images are shuffled; 0 for as many as the data set alone suggests (`data.order`)."""
    finetunes: bool = False
    """Start from a trained network of one time, which --init names."""
    checkpoint_every: int = 10_000
    """Iterations between checkpoints."""
    log_every: int = 100
    """Iterations between points in MLflow."""

    def __post_init__(self) -> None:
        """Check what no part can check alone."""
        if self.checkpoint_every < 1 or self.log_every < 1:
            raise ConfigError("checkpoint-every and log-every must be at least 1.")
        batch, workers, parts = self.train.batch_size, self.scaling.workers, self.train.accumulate
        if batch % workers:
            raise ConfigError(
                f"train.batch-size {batch} does not divide among scaling.workers {workers}; choose a multiple."
            )
        if batch // workers % parts:
            raise ConfigError(
                f"the {batch // workers} images of a worker do not divide into train.accumulate {parts} micro-batches; "
                "choose a divisor."
            )
        check_objective(self.train, self.network)
        if self.time_steps not in PUBLISHED:
            raise ConfigError(
                f"time-steps: unknown name '{self.time_steps}'; {nearest(self.time_steps, list(PUBLISHED))}"
            )
        check_schedules(PUBLISHED[self.time_steps], self.network)
        if self.window < 0:
            raise ConfigError(f"window is {self.window}; give a number of shards, or 0.")
        discretization(0, self.train.iterations, self.schedule)  # refuses stages that training would never reach


def flatten(entry: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 0}} -> {"train.seed": 0}."""
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
