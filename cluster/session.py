"""The Ray of a command: the cluster that is given, or a private Ray of this machine that ends with the block.

A private Ray asks every client for a random token, since Ray listens on all network interfaces and runs whatever it is
sent. It ends its own processes only, by process id; Ray's `ray stop` ends everybody's.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from cluster import processes, ray_internals
from cluster.errors import ClusterError

OBJECT_STORE_BYTES = 200 * 2**20
"""Shared memory of one local node."""

_HOME = Path(__file__).resolve().parents[1]
"""The folder that holds our packages. Ray puts the directory in which it is started first on its workers' path, and a
package of a user's there may have the name of ours."""

DRIVER_ENV = {
    # Workers stay in the job's directory, so that `import pipelines` works.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # The controller looks at the workers this often; a `ray.train.report` waits for the look. Ray's own is 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Two busy cores may need longer than Ray's 60 s to import torch in every worker.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    # Otherwise every line a worker prints appears twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Noise: every report of every rank, and a question to the dashboard a private Ray has not. Read at ray's import.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "Reporting training result|"
    "Failed to query Ray Train Controller actor state|Found multiple active Ray instances",
    # Without this Ray warns about GPUs in every process that asked for none.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Defaults for what Ray reads from the environment of the process that calls it."""

_PRIVATE_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # No node of a single machine is taken away with a warning.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
_CONNECT_SECONDS = 10.0


def in_job() -> bool:
    """Whether this process is the driver of a submitted job, where Ray sets this variable."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def is_given() -> bool:
    """Whether the work is done by a cluster that is there already: of this job, or of RAY_ADDRESS."""
    return in_job() or bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def connect(*, cpus: int | None = None, worker_logs: bool = True) -> Iterator[None]:
    """Connect this process to Ray for the length of the block; inside such a block it changes nothing.

    Inside a Ray job, and where RAY_ADDRESS names a cluster, it connects to that one. Otherwise it starts a private Ray
    on this machine and ends it with the block, also on Ctrl-C and SIGTERM; then no process and no file of it is left.
    After a kill -9 of this process its workers end at once, two small agents of Ray a minute later.

    Args:
        cpus: CPUs the private Ray believes to have; None means those of this machine.
        worker_logs: print here what the workers print.

    Raises:
        ClusterError: RAY_ADDRESS names no cluster that answers.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    given = is_given()
    defaults = DRIVER_ENV if given else DRIVER_ENV | _PRIVATE_ENV
    with (
        processes.handlers_kept(),
        environment({name: value for name, value in defaults.items() if name not in os.environ}),
        _given_ray(worker_logs) if given else _private_ray(cpus, worker_logs),
    ):
        yield


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the length of the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _given_ray(worker_logs: bool) -> Iterator[None]:
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise ClusterError(
            f"RAY_ADDRESS is {address}, the address of a job server; submit the command there with "
            "`ray job submit`, or set RAY_ADDRESS to the cluster's own host:port"
        )
    if address not in ("", "auto", "local"):
        require_listener(address, "Ray cluster", "start it, or unset RAY_ADDRESS to work on this machine alone")
    try:
        with chdir(_HOME):
            ray.init(logging_level=logging.WARNING, log_to_driver=worker_logs)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise ClusterError(f"no Ray cluster answers at {address or 'the address of this job'}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _private_ray(cpus: int | None, worker_logs: bool) -> Iterator[None]:
    import ray

    ray_internals.ask_for_token()
    with processes.own(partial(ray.shutdown, wait_for_processes=True)) as (folder, roots):
        try:
            with environment({"RAY_TMPDIR": str(folder)}), processes.noted(roots), chdir(_HOME):
                ray.init(
                    address="local",
                    num_cpus=cpus or os.cpu_count(),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    logging_level=logging.WARNING,
                    log_to_driver=worker_logs,
                )
        except Exception as error:
            raise ClusterError(f"Ray did not start on this machine: {error}") from error
        ray_internals.note_address(folder, ray.get_runtime_context().gcs_address)
        # SIGTERM unwinds the stack as Ctrl-C does, so that the block's end is reached.
        processes.handle(signal.default_int_handler, signal.SIGTERM)
        yield


def require_listener(address: str, what: str, remedy: str) -> None:
    """Raise ClusterError unless `address` (`host:port`, or a URL) is well-formed and accepts connections.

    Ray itself would ask for minutes, deaf to Ctrl-C.

    Args:
        address: where to connect.
        what: what should listen there, for the message.
        remedy: what to do if nothing does, for the message.
    """
    url = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = url.hostname, url.port or {"http": 80, "https": 443}.get(url.scheme)
    except ValueError:
        host = port = None
    if not host or not port:
        raise ClusterError(f"{address!r} is no address of {what}: host and port are wanted")
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"no {what} answers at {address} ({error}); {remedy}") from error
