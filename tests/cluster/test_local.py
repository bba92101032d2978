import os
import signal
import subprocess
import sys
import time
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


@pytest.mark.slow
def test_a_private_ray_leaves_no_process_file_setting_or_handler_behind() -> None:
    import ray

    before = (psutil.Process().children(recursive=True), folders(), signal.getsignal(signal.SIGINT))
    settings = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    with local.session(cpus=2):
        assert ray.cluster_resources()["CPU"] == 2
        assert len(psutil.Process().children(recursive=True)) > len(before[0])
        scaling.check_resources(ScalingOptions(workers=2))
        with pytest.raises(ClusterError, match=r"3 workers.* 2 CPU"):
            scaling.check_resources(ScalingOptions(workers=3))
        with pytest.raises(ClusterError, match="0 GPU"):
            scaling.check_resources(ScalingOptions(gpu=True))
    assert (psutil.Process().children(recursive=True), folders(), signal.getsignal(signal.SIGINT)) == before
    assert {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")} == settings


@pytest.mark.slow
def test_a_private_ray_asks_for_a_token(tmp_path: Path) -> None:
    import ray

    with local.session(cpus=1):
        address = ray.get_runtime_context().gcs_address
        stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-c", f"import ray; ray.init('{address}')"],
            env=stranger | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
            capture_output=True,
            text=True,
        )
    assert done.returncode != 0
    assert "InvalidAuthToken" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_private_ray_and_all_its_processes(sign: signal.Signals) -> None:
    present = folders()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SLEEPER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True) as driver:
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
def test_the_reaper_is_not_needed_even_when_the_driver_is_killed() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True, env=env) as driver:
        assert driver.stdout is not None
        driver.stdout.readline()
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
    deadline = time.monotonic() + 30
    while any(process.is_running() for process in family) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [process for process in family if process.is_running()] == []


def test_the_address_of_a_job_server_is_no_cluster_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ClusterError, match="ray job submit"), local.session():
        pass


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=address), local.session():
        pass
