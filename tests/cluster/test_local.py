import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from servers import free_port

from cluster import local, scaling
from cluster.errors import ClusterError
from cluster.scaling import ScalingOptions

ROOT = Path(__file__).resolve().parents[2]

SLEEPER = """
import time
from cluster.local import session
with session(cpus=1):
    import ray

    @ray.remote
    def sleep():
        time.sleep(600)

    task = sleep.remote()
    time.sleep(1)
    print("ready", flush=True)
    ray.get(task)
"""


@pytest.fixture(autouse=True)
def no_cluster_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def folders() -> set[Path]:
    return set(Path("/tmp").glob("bcm-ray-*"))


def plain() -> dict[str, str]:
    """An environment in which nothing says where a cluster is."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PYTHONPATH": str(ROOT)}


def ray_settings() -> dict[str, str]:
    """Ray's part of the environment, but for the token, which one process keeps."""
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_") and "_AUTH_" not in name}


@pytest.mark.slow
def test_a_private_ray_leaves_no_process_file_setting_or_handler_behind() -> None:
    import ray

    before = (psutil.Process().children(recursive=True), folders(), signal.getsignal(signal.SIGINT))
    settings = ray_settings()
    with local.session(cpus=2):
        assert ray.cluster_resources()["CPU"] == 2
        assert len(psutil.Process().children(recursive=True)) > len(before[0])
        scaling.check_resources(ScalingOptions(workers=2))
        with pytest.raises(ClusterError, match=r"3 workers.* 2 CPU"):
            scaling.check_resources(ScalingOptions(workers=3))
        with pytest.raises(ClusterError, match="0 GPU"):
            scaling.check_resources(ScalingOptions(gpu=True))
    assert (psutil.Process().children(recursive=True), folders(), signal.getsignal(signal.SIGINT)) == before
    assert ray_settings() == settings


@pytest.mark.slow
def test_a_private_ray_asks_for_a_token(tmp_path: Path) -> None:
    import ray

    with local.session(cpus=1):
        address = ray.get_runtime_context().gcs_address
        done = subprocess.run(
            [sys.executable, "-c", f"import ray; ray.init('{address}')"],
            env=plain() | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
            capture_output=True,
            text=True,
        )
    assert done.returncode != 0
    assert "InvalidAuthToken" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_private_ray_and_all_its_processes(sign: signal.Signals) -> None:
    present = folders()
    command = [sys.executable, "-c", SLEEPER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=plain(), start_new_session=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        family = psutil.Process(driver.pid).children(recursive=True)
        started = folders() - present
        # As a terminal does: to every process of the group.
        os.killpg(driver.pid, sign)
        assert driver.wait(60) != 0
    assert len(family) > 4
    assert [process for process in family if process.is_running()] == []
    assert started and not [folder for folder in started if folder.exists()]


@pytest.mark.slow
def test_a_driver_that_is_killed_takes_its_workers_along() -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True, env=plain()) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        # Ray's agents go by themselves, a minute later.
        family = [each for each in psutil.Process(driver.pid).children(recursive=True) if "Agent" not in each.name()]
        driver.kill()
    assert len(family) > 4
    psutil.wait_procs(family, timeout=20)
    assert [process for process in family if process.is_running()] == []


def test_the_address_of_a_job_server_is_no_cluster_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ClusterError, match="ray job submit"), local.session():
        pass


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=address), local.session():
        pass
