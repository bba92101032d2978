"""How many workers a training takes, what each holds, and what happens when one dies.

Ray is imported inside the functions: importing this module must not cost a `--help` several seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster import processes, ray_internals
from cluster.errors import ClusterError
from cluster.runtime_env import refuse_secrets

if TYPE_CHECKING:
    import pyarrow.fs
    from ray.train import Result, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer


@dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """What a training asks of the cluster."""

    workers: int = 1
    """Training processes, one rank each."""
    gpu: bool = False
    """One GPU per worker; without it the workers train on CPU."""
    cpus_per_worker: float = 1
    """CPU cores reserved for each worker."""
    max_failures: int = 3
    """Worker failures survived: each restarts all workers from the last checkpoint. Lost spot nodes are not counted."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept in storage."""

    def __post_init__(self) -> None:
        """Refuse numbers Ray would take but never place."""
        lowest = {"workers": 1, "max_failures": 0, "keep_checkpoints": 1}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ClusterError(f"scaling: {name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.cpus_per_worker < float("inf"):
            raise ClusterError(f"scaling: cpus_per_worker is {self.cpus_per_worker}; it must be more than 0")


def scaling_config(options: ScalingOptions, *, local: bool = False) -> ScalingConfig:
    """Ray Train's scaling config. SPREAD puts the workers on different nodes where there are enough.

    With `local`, the one worker is a function call in this process and no cluster is needed: for tests.
    """
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=0 if local else options.workers,
        use_gpu=options.gpu,
        resources_per_worker=worker_resources(options),
        placement_strategy="SPREAD",
    )


def worker_resources(options: ScalingOptions) -> dict[str, float]:
    """What one worker reserves, in Ray's names."""
    return {"CPU": options.cpus_per_worker} | ({"GPU": 1} if options.gpu else {})


def run_config(
    options: ScalingOptions,
    *,
    name: str,
    storage_path: str,
    storage_filesystem: pyarrow.fs.FileSystem | None,
    worker_env: Mapping[str, str],
    callbacks: Sequence[UserCallback] = (),
) -> RunConfig:
    """Ray Train's run config. A name already in storage goes on from its last checkpoint.

    Args:
        options: retries and the number of checkpoints kept.
        name: folder of the run below `storage_path`; for a new run it must be a new name.
        storage_path: absolute path or URL; without its scheme where `storage_filesystem` is given.
        storage_filesystem: where the path lies; None lets Ray choose by the scheme.
        worker_env: environment added to every worker. Secrets are refused: Ray stores and prints this mapping.
        callbacks: each must catch its own exceptions, since one that escapes ends the run without a retry.
    """
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig

    refuse_secrets(worker_env, "the workers' environment")
    return RunConfig(
        name=name,
        storage_path=storage_path,
        storage_filesystem=storage_filesystem,
        failure_config=FailureConfig(max_failures=options.max_failures),
        checkpoint_config=CheckpointConfig(num_to_keep=options.keep_checkpoints),
        callbacks=list(callbacks),
        worker_runtime_env={"env_vars": dict(worker_env)},
        logging_config=LoggingConfig(log_level="WARNING"),
    )


def check_resources(options: ScalingOptions) -> None:
    """Raise ClusterError if the connected cluster, grown as far as its autoscaler may, can never hold the workers.

    Ray Train itself would wait for them without end. Resources in use by others count as present.
    """
    import ray

    asked = worker_resources(options)
    growth = ray_internals.most_resources()
    if growth:
        present = {name: float(growth.get(name, 0)) for name in asked}
        fits = all(present[name] >= amount * options.workers for name, amount in asked.items())
    else:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        present = {name: sum(node.get(name, 0.0) for node in nodes) for name in asked}
        # A worker cannot be split over nodes, so leftovers of two nodes do not make one more.
        held = sum(min(int(node.get(name, 0.0) / amount) for name, amount in asked.items()) for node in nodes)
        fits = held >= options.workers
    if not fits:
        raise ClusterError(
            f"{options.workers} workers with {_amounts(asked)} each do not fit into this cluster, which has "
            f"{_amounts(present)} in all; ask for fewer workers or less per worker, or add nodes"
        )


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def fit(trainer: TorchTrainer) -> Result:
    """Run `trainer.fit()`, raising what a worker raised instead of Ray's wrapper.

    A Ctrl-C or SIGTERM during training, which Ray turns into a clean abort and an exit, ends as KeyboardInterrupt.
    """
    from ray.train import TrainingFailedError

    with processes.handlers_kept():
        try:
            return trainer.fit()
        except TrainingFailedError as error:
            raise user_error(error) from error
        except SystemExit as stopped:
            raise KeyboardInterrupt from stopped


def user_error(error: BaseException) -> BaseException:
    """The exception raised first by a worker (or callback), dug out of Ray Train's wrappers.

    When one rank fails the others often fail too, with RuntimeErrors about a lost connection: such a one is returned
    only if no rank has anything better. An error without a wrapper is returned as it is.
    """
    inner = [user_error(each) for each in ray_internals.unwrapped(error)]
    return next((each for each in inner if not isinstance(each, RuntimeError)), inner[0] if inner else error)
