"""Ray on this machine: a private one-node Ray for a single command, and a cluster of several nodes for tests.

Both ask every client for a random token, since Ray listens on all network interfaces and runs whatever it is sent.
Both end their own processes only, by process id; Ray's `ray stop` ends everybody's.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

from cluster import interrupts, processes
from cluster.addresses import require_listener
from cluster.errors import ClusterError

if TYPE_CHECKING:
    from ray._private.node import Node

OBJECT_STORE_BYTES = 200 * 2**20
"""Shared memory of one local node."""

DRIVER_ENV = {
    # Workers stay in the job's directory, so that relative paths and `import pipelines` work.
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
_CLUSTER_GIVEN = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")


@contextmanager
def session(*, cpus: int | None = None, worker_logs: bool = True) -> Iterator[None]:
    """Connect this process to Ray for the length of the block.

    Inside a Ray job, and where RAY_ADDRESS names a cluster, it connects to that one. Otherwise it starts a private Ray
    on this machine and ends it with the block, also on Ctrl-C and SIGTERM; then no process and no file of it is left.
    After a kill -9 of this process its workers end at once, two small agents of Ray a minute later.

    Args:
        cpus: CPUs the private Ray believes to have; None means those of this machine.
        worker_logs: print here what the workers print.

    Raises:
        ClusterError: RAY_ADDRESS names no cluster that answers.
    """
    given = any(os.environ.get(name) for name in _CLUSTER_GIVEN)
    with (
        interrupts.handlers_kept(),
        _environment(_unset(DRIVER_ENV if given else DRIVER_ENV | _PRIVATE_ENV)),
        _connection(worker_logs) if given else _private_ray(cpus, worker_logs),
    ):
        yield


def _unset(defaults: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in defaults.items() if name not in os.environ}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
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
def _connection(worker_logs: bool) -> Iterator[None]:
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

    _ask_for_token()
    folder = processes.short_folder()
    before = psutil.Process().children()
    roots: list[psutil.Process] | None = None
    try:
        with _environment({"RAY_TMPDIR": str(folder)}):
            _start(cpus, worker_logs)
        roots = processes.children_since(before)
        _note_address(folder, ray.get_runtime_context().gcs_address)
        interrupts.exit_on_sigterm()
        yield
    finally:
        interrupts.ignore()
        ours = processes.with_descendants(processes.children_since(before) if roots is None else roots)
        ray.shutdown(wait_for_processes=True)
        processes.end(ours)
        processes.remove_folder(folder)


def _start(cpus: int | None, worker_logs: bool) -> None:
    import ray

    try:
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


def _note_address(folder: Path, address: str) -> None:
    """Tell Ray's own actors which cluster they are in.

    Without the note, where another Ray runs on this machine, the actor that watches Ray Train's controller asks that
    one, does not find the controller there, and takes a healthy training's resources away.
    """
    (folder / "ray" / "ray_current_cluster").write_text(address)


class LocalCluster:
    """A Ray cluster of several nodes on this machine, with job server, for tests and demonstrations.

    The first node is the head and has the machine's own address; the others have 127.0.0.2, 127.0.0.3, ..., so that
    Ray sees distinct nodes. Gloo must then be told GLOO_SOCKET_IFNAME=lo, which every node's environment does.

    Args:
        nodes: nodes to start with, the head among them.
        cpus: CPUs each node believes to have.
        env: environment of the nodes, over this process's own; secrets belong here and not into a job.
    """

    address: str
    """host:port for RAY_ADDRESS."""
    job_address: str
    """URL of the job server."""
    folder: Path
    """Ray's files, gone with the cluster."""

    def __init__(self, *, nodes: int = 2, cpus: int = 2, env: Mapping[str, str] | None = None) -> None:
        """Only takes note; entering the context starts the nodes."""
        self._count = nodes
        self._cpus = cpus
        self._added = 0
        self._env = {
            # A job's `python` must be this one.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "GLOO_SOCKET_IFNAME": "lo",
            **(env or {}),
        }

    def __enter__(self) -> Self:
        """Start the nodes; about 6 s for the head and 2 s for each other."""
        from ray.cluster_utils import Cluster

        _ask_for_token()
        self._before = psutil.Process().children()
        self._roots: list[psutil.Process] = []
        self.folder = processes.short_folder()
        (self.folder / "ray").mkdir()
        self._cluster = Cluster()
        with ExitStack() as undo, interrupts.handlers_kept():
            # Without a folder of its own, every bare ray.init() of this user would find this cluster and join it.
            own = {"RAY_TMPDIR": str(self.folder), "RAY_USAGE_STATS_ENABLED": "0"}
            undo.enter_context(_environment(own))
            undo.callback(self._stop)
            self.address, self.job_address = self._start_head()
            self.nodes = [self.add_node() for _ in range(self._count - 1)]
            self._stack = undo.pop_all()
        return self

    def _start_head(self) -> tuple[str, str]:
        port, agent_port = processes.free_ports(2)
        head = self._cluster.add_node(
            num_cpus=self._cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=True,
            dashboard_port=port,
            dashboard_agent_listen_port=agent_port,
            env_vars=self._env,
        )
        self._roots = processes.children_since(self._before)
        return head.gcs_address, f"http://127.0.0.1:{port}"

    def add_node(self) -> Node:
        """Start one more node."""
        before = psutil.Process().children()
        self._added += 1
        node = self._cluster.add_node(
            num_cpus=self._cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            node_ip_address=f"127.0.0.{self._added + 1}",
            env_vars=self._env,
        )
        self._roots += processes.children_since(before)
        return node

    def kill_node(self, node: Node) -> None:
        """Kill a node that `add_node` returned, without warning, as a lost machine would go."""
        lost = processes.with_descendants([each for each in self._roots if each.pid in _pids(node)])
        self._cluster.remove_node(node, allow_graceful=False)
        processes.end(lost, patience=0)

    def __exit__(self, *_: object) -> None:
        """End every process of the cluster and remove its files."""
        self._stack.close()

    def _stop(self) -> None:
        ours = processes.with_descendants(self._roots or processes.children_since(self._before))
        self._cluster.shutdown()
        processes.end(ours)
        processes.remove_folder(self.folder)


def _pids(node: Node) -> set[int]:
    return {info.process.pid for infos in node.all_processes.values() for info in infos}


def _ask_for_token() -> None:
    """Make Ray processes started from here demand a token, unless the user chose otherwise.

    It stays the same for the life of this process, because Ray keeps what it read first.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray has read the mode at its import.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def main() -> None:
    """Start a cluster, print where it is, and wait for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=main.__doc__)
    parser.add_argument("--nodes", type=int, default=2, help="nodes, the head among them (%(default)s)")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs of each node (%(default)s)")
    options = parser.parse_args()
    interrupts.exit_on_sigterm()
    with LocalCluster(nodes=options.nodes, cpus=options.cpus) as running:
        print(f"cluster     {running.address}\njob server  {running.job_address}")
        token = running.folder / "token"
        if "RAY_AUTH_TOKEN" in os.environ:
            token.touch(mode=0o600)
            token.write_text(os.environ["RAY_AUTH_TOKEN"])
            print(f"elsewhere:  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}")
        print("Ctrl-C ends it", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print("ending", flush=True)


if __name__ == "__main__":
    main()
