"""Real servers for the integration tests: an S3 object store and an MLflow tracking server."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running object store."""

    endpoint: str
    """URL of the server."""
    env: dict[str, str]
    """What a client's environment needs to reach it, the keys included."""


def free_port() -> int:
    """A TCP port on the loopback interface nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server(root: Path) -> Iterator[S3Server]:
    """Serve the sub-directories of `root` as buckets with random keys; objects are plain files below them."""
    key, secret = secrets.token_hex(8), secrets.token_hex(16)
    endpoint = f"http://127.0.0.1:{free_port()}"
    client = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        # Servers other than Amazon's refuse the checksum trailers of newer clients.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }
    command = [str(BIN / "rclone"), "serve", "s3", "--addr", endpoint.removeprefix("http://"), str(root)]
    # The keys go by environment, since a command line is readable by everybody.
    server_env = os.environ | {
        "RCLONE_AUTH_KEY": f'"{key},{secret}"',
        "RCLONE_CONFIG": str(root.parent / "rclone.conf"),
    }
    with _running(command, server_env, root.parent / "s3.log", ready=endpoint, seconds=30):
        yield S3Server(endpoint=endpoint, env=client)


@contextmanager
def mlflow_server(root: Path, artifacts: str, env: Mapping[str, str]) -> Iterator[str]:
    """A tracking server with its database in `root` and its artifacts at the URL `artifacts`; yields its URL.

    Args:
        root: an existing directory.
        artifacts: `s3://bucket/prefix` or a directory.
        env: added to the server's environment, for instance `S3Server.env`.
    """
    url = f"http://127.0.0.1:{free_port()}"
    command = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    command += ["--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}", "--artifacts-destination", artifacts]
    command += ["--workers", "1", "--allowed-hosts", "127.0.0.1:*,localhost:*"]
    server_env = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        # Eight processes and a gigabyte for jobs nobody starts.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        **env,
    }
    with _running(command, server_env, root / "mlflow-server.log", ready=f"{url}/health", seconds=120):
        yield url


@contextmanager
def _running(
    command: Sequence[str], env: Mapping[str, str], log: Path, *, ready: str, seconds: float
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; the whole process group goes with it."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=dict(env), cwd=log.parent, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait(server, ready, seconds, log)
        yield server
    finally:
        _end(server)


def _wait(server: subprocess.Popen[bytes], url: str, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError as answer:
            if answer.code < 500:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"{server.args} did not answer at {url} within {seconds} s:\n{log.read_text()[-3000:]}")


def _end(server: subprocess.Popen[bytes]) -> None:
    for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(server.pid, sign)
        except ProcessLookupError:
            break
        try:
            server.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    server.wait()


def served_model(uri: str, name: str) -> Any:
    """The champion of a local store as MLflow serves it; this runs its code."""
    import mlflow.pyfunc
    from mlflow import MlflowClient

    champion = MlflowClient(uri, registry_uri=uri).get_model_version_by_alias(name, "champion")
    return mlflow.pyfunc.load_model(str(champion.source))
