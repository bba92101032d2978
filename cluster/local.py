"""A Ray cluster of several nodes on this machine, for tests and demonstrations.

It asks every client for a random token and ends its own processes only, as `cluster.session` does.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cluster import processes, ray_internals
from cluster.session import OBJECT_STORE_BYTES, environment

if TYPE_CHECKING:
    from cluster.ray_internals import Node


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
        ray_internals.ask_for_token()
        self._cluster = ray_internals.several_nodes()
        with ExitStack() as undo:
            undo.enter_context(processes.handlers_kept())
            self.folder, self._roots = undo.enter_context(processes.own(self._cluster.shutdown))
            (self.folder / "ray").mkdir()
            # Without a folder of its own, every bare ray.init() of this user would find this cluster and join it.
            own = {"RAY_TMPDIR": str(self.folder), "RAY_USAGE_STATS_ENABLED": "0"}
            undo.enter_context(environment(own))
            port, agent_port = processes.free_ports(2)
            head = self._start(include_dashboard=True, dashboard_port=port, dashboard_agent_listen_port=agent_port)
            self.address, self.job_address = head.gcs_address, f"http://127.0.0.1:{port}"
            self.nodes = [self.add_node() for _ in range(self._count - 1)]
            self._stack = undo.pop_all()
        return self

    def _start(self, **options: Any) -> Node:
        with processes.noted(self._roots):
            return self._cluster.add_node(
                num_cpus=self._cpus, object_store_memory=OBJECT_STORE_BYTES, env_vars=self._env, **options
            )

    def add_node(self) -> Node:
        """Start one more node."""
        self._added += 1
        return self._start(node_ip_address=f"127.0.0.{self._added + 1}")

    def kill_node(self, node: Node) -> None:
        """Kill a node that `add_node` returned, without warning, as a lost machine would go."""
        pids = {info.process.pid for infos in node.all_processes.values() for info in infos}
        lost = processes.with_descendants([root for root in self._roots if root.pid in pids])
        self._cluster.remove_node(node, allow_graceful=False)
        processes.end(lost, patience=0)

    def __exit__(self, *_: object) -> None:
        """End every process of the cluster and remove its files."""
        self._stack.close()


def main() -> None:
    """Start a cluster, print where it is, and wait for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=main.__doc__)
    parser.add_argument("--nodes", type=int, default=2, help="nodes, the head among them (%(default)s)")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs of each node (%(default)s)")
    options = parser.parse_args()
    processes.handle(signal.default_int_handler, signal.SIGTERM)
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
