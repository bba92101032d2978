import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from servers import free_port

from cluster import session
from cluster.errors import ClusterError

ROOT = Path(__file__).resolve().parents[2]

SLEEPER = """
import time
from cluster.session import connect
with connect(cpus=1):
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


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, here and in subprocesses; short, since Ray puts sockets there."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def plain() -> dict[str, str]:
    """An environment in which nothing says where a cluster is."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PYTHONPATH": str(ROOT)}


def ray_settings() -> dict[str, str]:
    """Ray's part of the environment, but for the token, which a process keeps, and a mark that Ray itself leaves."""
    left = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_CLIENT_MODE")
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_") and name not in left}


@pytest.mark.slow
def test_a_private_ray_leaves_no_process_file_setting_or_handler_behind(short: Path) -> None:
    before = (psutil.Process().children(recursive=True), signal.getsignal(signal.SIGINT), ray_settings())
    with session.connect(cpus=2):
        assert len(psutil.Process().children(recursive=True)) > len(before[0])
        assert list(short.iterdir())
    assert (psutil.Process().children(recursive=True), signal.getsignal(signal.SIGINT), ray_settings()) == before
    assert not list(short.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_private_ray_and_all_its_processes(sign: signal.Signals, short: Path) -> None:
    command = [sys.executable, "-c", SLEEPER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=plain(), start_new_session=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        family = psutil.Process(driver.pid).children(recursive=True)
        assert list(short.iterdir())
        # As a terminal does: to every process of the group.
        os.killpg(driver.pid, sign)
        assert driver.wait(60) != 0
    assert len(family) > 4
    assert [process for process in family if process.is_running()] == []
    assert not list(short.iterdir())


@pytest.mark.slow
def test_a_driver_that_is_killed_takes_its_workers_along(short: Path) -> None:
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
    with pytest.raises(ClusterError, match="ray job submit"), session.connect():
        pass


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=address), session.connect():
        pass
