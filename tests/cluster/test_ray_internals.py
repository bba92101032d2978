"""What Ray does not promise is still there: a new Ray fails here first."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray.exceptions
from ray._private.runtime_env import packaging
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from cluster import options as scaling
from cluster import ray_internals, session
from cluster.errors import ClusterError
from cluster.options import ScalingOptions


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private Ray of two CPUs beside a note of another one; yields its address."""
    other = tmp_path_factory.mktemp("other")
    (other / "ray").mkdir()
    (other / "ray" / "ray_current_cluster").write_text("192.0.2.99:6379")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TMPDIR", str(other))
        with session.connect(cpus=2):
            yield ray.get_runtime_context().gcs_address


@pytest.mark.slow
def test_workers_that_can_never_be_placed_are_refused(private: str) -> None:
    scaling.check_resources(ScalingOptions(workers=2))
    with pytest.raises(ClusterError, match=r"3 workers.* 2 CPU"):
        scaling.check_resources(ScalingOptions(workers=3))
    with pytest.raises(ClusterError, match="0 GPU"):
        scaling.check_resources(ScalingOptions(gpu=True))


@pytest.mark.slow
def test_a_cluster_without_an_autoscaler_cannot_grow(private: str) -> None:
    assert ray_internals.most_resources() == {}


@pytest.mark.slow
def test_a_private_ray_is_not_mistaken_for_another_one(private: str) -> None:
    @ray.remote
    def where_rays_own_actors_look() -> str | None:
        from ray._private.services import canonicalize_bootstrap_address

        return canonicalize_bootstrap_address(None)  # pyright: ignore[reportArgumentType]

    assert ray.get(where_rays_own_actors_look.remote()) == private


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
def test_a_private_ray_asks_for_a_token(private: str, known: bool) -> None:
    script = f"from ray._raylet import GcsClient; print(GcsClient('{private}').cluster_id)"
    guess = {} if known else {"RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | guess, capture_output=True, text=True)
    assert (done.returncode == 0) == known
    assert ("InvalidAuthToken" in done.stderr) != known


def test_a_dead_worker_is_reported_as_such() -> None:
    died = ray.exceptions.RayActorError()
    health = WorkerHealthCheckFailedError("worker 0", died)
    assert scaling.user_error(WorkerGroupError("failed", {0: health})) is died


def test_wrappers_are_opened_one_by_one() -> None:
    first, second = ValueError("first"), KeyError("second")
    group = WorkerGroupError("both failed", {1: second, 0: first})
    assert ray_internals.unwrapped(ControllerError(group)) == [group]
    assert ray_internals.unwrapped(group) == [first, second]
    assert ray_internals.unwrapped(first) == []


def test_a_package_is_weighed_as_a_job_would_upload_it(tmp_path: Path) -> None:
    code = tmp_path / "code"
    for name in ("kept.bin", "ignored.bin", "excluded.bin"):
        code.mkdir(exist_ok=True)
        (code / name).write_bytes(os.urandom(100_000))
    (code / ".gitignore").write_text("ignored.bin\n")
    assert 100_000 < ray_internals.package_bytes(code, ["excluded.bin"]) < 110_000
    packaging.create_package(str(code), tmp_path / "x.zip", include_gitignore=True, excludes=["excluded.bin"])
    assert {"kept.bin"} <= set(zipfile.ZipFile(tmp_path / "x.zip").namelist()) <= {"kept.bin", ".gitignore"}


def test_rays_own_check_names_the_place_of_a_mistake() -> None:
    config = {"cluster_name": "x", "provider": {"type": "local", "head_ip": "h", "worker_ips": []}}
    assert ray_internals.cluster_file_problems({**config, "auth": {"ssh_user": 7}})[0].startswith("auth/ssh_user: ")


def test_nodes_are_added_to_an_empty_cluster() -> None:
    cluster = ray_internals.several_nodes()
    assert not cluster.list_all_nodes()
    assert callable(cluster.add_node) and callable(cluster.remove_node) and callable(cluster.shutdown)


def test_a_chosen_way_of_authentication_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    ray_internals.ask_for_token()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in os.environ
