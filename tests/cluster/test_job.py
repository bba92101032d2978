"""Jobs on a real cluster of two nodes, with a real object store: what the pipelines stand on."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from servers import S3Server, free_port, s3_server

from cluster import submit
from cluster.errors import ClusterError
from cluster.local import LocalCluster, local_cluster
from cluster.session import connect

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, S3Server]]:
    root = tmp_path_factory.mktemp("store") / "buckets"
    (root / "runs").mkdir(parents=True)
    with s3_server(root) as server:
        yield root, server


@pytest.fixture(scope="module")
def cluster(store: tuple[Path, S3Server]) -> Iterator[LocalCluster]:
    with local_cluster(nodes=2, cpus=1, env=store[1].env) as running:
        yield running


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A working directory to ship: our package and a job."""
    package = Path(__file__).resolve().parents[2] / "cluster"
    (tmp_path / "cluster").symlink_to(package)
    (tmp_path / "fail.py").write_text("import sys; print('about to fail'); sys.exit(7)")
    return tmp_path


@pytest.mark.slow
def test_rays_own_command_runs_a_job(cluster: LocalCluster, code: Path) -> None:
    command = [str(BIN / "ray"), "job", "submit", "--address", cluster.job_address, "--working-dir", str(code), "--"]
    done = subprocess.run([*command, "python", "fail.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "about to fail" in done.stdout
    script = "import os; print(os.path.exists('fail.py'), 'AWS_SECRET_ACCESS_KEY' in os.environ)"
    done = subprocess.run([*command, "python", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "True True" in done.stdout


@pytest.mark.slow
def test_a_jobs_own_exit_code_and_log_come_back(
    cluster: LocalCluster, code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.submit(cluster.job_address, ["python", "fail.py"], working_dir=code, env_vars={}) == 7
    assert capsys.readouterr().out.count("about to fail") == 1


@pytest.mark.slow
def test_a_stopped_job_is_no_success(
    cluster: LocalCluster, code: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.job_submission import JobSubmissionClient

    async def broken(client: JobSubmissionClient, job: str) -> object:
        client.stop_job(job)
        raise ConnectionError("stream lost")
        yield

    monkeypatch.setattr(JobSubmissionClient, "tail_job_logs", broken)
    script = "import time; print('waiting', flush=True); time.sleep(600)"
    assert submit.submit(cluster.job_address, ["python", "-c", script], working_dir=code, env_vars={}) != 0
    assert "STOPPED" in capsys.readouterr().out


def test_an_address_without_a_server_is_named(code: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ClusterError, match=address):
        submit.submit(address, ["python", "fail.py"], working_dir=code, env_vars={})


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "http://", ""])
def test_an_address_that_is_no_url_is_refused(code: Path, address: str) -> None:
    with pytest.raises(ClusterError, match=r"http://host:8265|host and port"):
        submit.submit(address, ["python", "fail.py"], working_dir=code, env_vars={})


def test_a_server_that_is_no_job_server_is_named(code: Path, store: tuple[Path, S3Server]) -> None:
    with pytest.raises(ClusterError, match="not a Ray job server"):
        submit.submit(store[1].endpoint, ["python", "fail.py"], working_dir=code, env_vars={})


@pytest.mark.slow
def test_a_killed_node_is_gone_and_its_processes_too(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    before = set(psutil.Process().children(recursive=True))
    node = cluster.add_node()
    started = set(psutil.Process().children(recursive=True)) - before
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    with connect():
        assert sum(each["Alive"] for each in ray.nodes()) == 3
        cluster.kill_node(node)
        assert started and not [process for process in started if process.is_running()]
        deadline = time.monotonic() + 30
        while sum(each["Alive"] for each in ray.nodes()) == 3 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert sum(each["Alive"] for each in ray.nodes()) == 2
