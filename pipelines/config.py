"""The configuration of a run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, TypeVar, cast, get_type_hints

from bcm.networks import KINDS, NetworkConfig, network_to_dict
from bcm.schedule import ScheduleConfig, discretization
from bcm.training import TrainConfig, check_objective
from cluster.options import ScalingOptions
from pipelines.errors import ConfigError, nearest

T = TypeVar("T")


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
    finetunes: bool = False
    """Start from a trained network of one time, which `pipelines.finetune` is given."""
    checkpoint_every: int = 10_000
    """Iterations between checkpoints."""
    log_every: int = 100
    """Iterations between points in MLflow."""

    def __post_init__(self) -> None:
        """Check what no part can check alone."""
        if self.checkpoint_every < 1 or self.log_every < 1:
            raise ConfigError("checkpoint-every and log-every must be at least 1.")
        self._check_batch()
        check_objective(self.train, self.network)
        discretization(0, self.train.iterations, self.schedule)  # refuses stages that training would never reach

    def _check_batch(self) -> None:
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready nested dict; the network's has its `kind` too."""
        return asdict(self) | {"network": network_to_dict(self.network)}

    @staticmethod
    def from_dict(entry: Mapping[str, Any]) -> "Config":
        """The inverse of `to_dict`; an unknown or missing key is a `ConfigError` that names the nearest known one."""
        return _from_dict(Config, entry, "config")


def flatten(entry: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 0}} -> {"train.seed": 0}."""
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _from_dict(kind: type[T], entry: Mapping[str, Any], where: str) -> T:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: {entry!r} is given where an object with keys is needed.")
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in entry:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'; {nearest(key, known)}")
    missing = [key for key in known if key not in entry]
    if missing:
        raise ConfigError(f"{where}: missing key '{missing[0]}'.")
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if hints[key] == NetworkConfig:
            values[key] = _network(value, f"{where}.{key}")
        elif is_dataclass(hints[key]):
            values[key] = _from_dict(cast(type[Any], hints[key]), value, f"{where}.{key}")
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: a value is of the wrong kind ({error}).") from error


def _network(entry: Mapping[str, Any], where: str) -> NetworkConfig:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: {entry!r} is given where an object with keys is needed.")
    if (kind := str(entry.get("kind"))) not in KINDS:
        raise ConfigError(f"{where}: the kind of network is '{kind}'; {nearest(kind, list(KINDS))}")
    return _from_dict(KINDS[kind], {key: value for key, value in entry.items() if key != "kind"}, where)
