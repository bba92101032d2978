import os

import pytest
import ray.exceptions
import ray.train
from ray.train import ControllerError, WorkerGroupError
from ray.train.torch import TorchTrainer

from cluster import options as scaling
from cluster.errors import ClusterError
from cluster.options import ScalingOptions


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0},
        {"cpus_per_worker": 0},
        {"cpus_per_worker": float("nan")},
        {"max_failures": -1},
        {"keep_checkpoints": 0},
    ],
)
def test_impossible_numbers_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ClusterError, match=next(iter(wrong))):
        ScalingOptions(**wrong)  # type: ignore[arg-type]


def test_options_become_rays_own_scaling_config() -> None:
    config = scaling.scaling_config(ScalingOptions(workers=3, gpu=True, cpus_per_worker=2))
    assert isinstance(config, ray.train.ScalingConfig)
    assert config.num_workers == 3
    assert config.total_resources == {"CPU": 6, "GPU": 3}


def test_cpu_workers_ask_for_no_gpu() -> None:
    config = scaling.scaling_config(ScalingOptions(workers=2))
    assert config.total_resources == {"CPU": 2}
    assert not config.use_gpu


def test_a_local_training_is_a_call_in_this_process() -> None:
    def worker() -> None:
        seen.append((os.getpid(), ray.train.get_context().get_world_size()))

    seen: list[tuple[int, int]] = []
    config = scaling.scaling_config(ScalingOptions(), local=True)
    scaling.fit(TorchTrainer(worker, scaling_config=config))
    assert seen == [(os.getpid(), 1)]
    assert not ray.is_initialized()


def test_options_become_rays_own_run_config() -> None:
    options = ScalingOptions(max_failures=5, keep_checkpoints=7)
    config = scaling.run_config(
        options, name="run-1", storage_path="/tmp/x", storage_filesystem=None, worker_env={"OMP_NUM_THREADS": "1"}
    )
    assert config.failure_config is not None and config.failure_config.max_failures == 5
    assert config.checkpoint_config is not None and config.checkpoint_config.num_to_keep == 7
    assert config.worker_runtime_env == {"env_vars": {"OMP_NUM_THREADS": "1"}}


def test_secrets_do_not_enter_the_run_config() -> None:
    with pytest.raises(ClusterError, match="AWS_SECRET_ACCESS_KEY"):
        scaling.run_config(
            ScalingOptions(),
            name="run-1",
            storage_path="/tmp/x",
            storage_filesystem=None,
            worker_env={"AWS_SECRET_ACCESS_KEY": "x"},
        )


def test_a_workers_own_exception_is_dug_out() -> None:
    cause = ValueError("shard 7 is truncated")
    assert scaling.user_error(WorkerGroupError("rank 1 failed", {1: cause})) is cause
    assert scaling.user_error(ControllerError(WorkerGroupError("rank 1 failed", {1: cause}))) is cause


def test_a_lost_connection_is_not_taken_for_the_cause() -> None:
    cause = ValueError("shard 7 is truncated")
    error = WorkerGroupError("both failed", {0: RuntimeError("connection closed by peer"), 1: cause})
    assert scaling.user_error(error) is cause


def test_a_lost_connection_is_the_cause_where_nothing_else_happened() -> None:
    lost = RuntimeError("connection closed by peer")
    assert scaling.user_error(WorkerGroupError("failed", {1: RuntimeError("later"), 0: lost})) is lost


def test_an_exception_from_a_task_is_dug_out() -> None:
    cause = ValueError("no such bucket")
    assert scaling.user_error(ControllerError(ray.exceptions.RayTaskError("f", "traceback", cause))) is cause


def test_an_unwrapped_error_stays_as_it_is() -> None:
    error = KeyError("x")
    assert scaling.user_error(error) is error
