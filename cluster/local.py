"""A Ray cluster of several nodes on this machine, for tests and demonstrations.

It asks every client for a random token and ends its own processes only, as `cluster.session` does.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cluster import processes, ray_internals
from cluster.session import OBJECT_STORE_BYTES, environment

if TYPE_CHECKING:
    from cluster.ray_internals import Node


@contextmanager
def local_cluster(*, nodes: int = 2, cpus: int = 2, env: Mapping[str, str] | None = None) -> Iterator[LocalCluster]:
    """Run a cluster of several nodes with a job server; about 6 s for the head and 2 s for each other node.

    The first node is the head and has the machine's own address; the others have 127.0.0.2, 127.0.0.3, ..., so that
    Ray sees distinct nodes. Gloo must then be told GLOO_SOCKET_IFNAME=lo, which every node's environment does.

    Args:
        nodes: nodes to start with, the head among them.
        cpus: CPUs each node believes to have.
        env: environment of the nodes, over this process's own; secrets belong here and not into a job.
    """
    # A job's `python` must be this one.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    node_env = {"PATH": path, "GLOO_SOCKET_IFNAME": "lo", **(env or {})}
    ray_internals.ask_for_token()
    cluster = ray_internals.several_nodes()
    start = partial(cluster.add_node, num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, env_vars=node_env)
    with processes.handlers_kept(), processes.own(cluster.shutdown) as (folder, roots):
        (folder / "ray").mkdir()
        # Without a folder of its own, every bare ray.init() of this user would find this cluster and join it.
        with environment({"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}):
            port, agent_port = processes.free_ports(2)
            with processes.noted(roots):
                head = start(include_dashboard=True, dashboard_port=port, dashboard_agent_listen_port=agent_port)
            running = LocalCluster(
                address=head.gcs_address,
                job_address=f"http://127.0.0.1:{port}",
                folder=folder,
                roots=roots,
                start=start,
                remove=cluster.remove_node,
            )
            for _ in range(nodes - 1):
                running.add_node()
            yield running


@dataclass(kw_only=True)
class LocalCluster:
    """A running cluster, see `local_cluster`."""

    address: str
    """host:port for RAY_ADDRESS."""
    job_address: str
    """URL of the job server."""
    folder: Path
    """Ray's files, gone with the cluster."""
    roots: list[psutil.Process]
    """The processes that its nodes began with."""
    start: Callable[..., Node]
    """Starts a node with further options."""
    remove: Callable[..., None]
    """Takes a node out of the cluster."""
    added: int = 0
    """Nodes added to the head."""

    def add_node(self) -> Node:
        """Start one more node."""
        self.added += 1
        with processes.noted(self.roots):
            return self.start(node_ip_address=f"127.0.0.{self.added + 1}")

    def kill_node(self, node: Node) -> None:
        """Kill a node that `add_node` returned, without warning, as a lost machine would go."""
        pids = {info.process.pid for infos in node.all_processes.values() for info in infos}
        lost = processes.with_descendants([root for root in self.roots if root.pid in pids])
        self.remove(node, allow_graceful=False)
        processes.end(lost, patience=0)


def main() -> None:
    """Start a cluster, print where it is, and wait for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=main.__doc__)
    parser.add_argument("--nodes", type=int, default=2, help="nodes, the head among them (%(default)s)")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs of each node (%(default)s)")
    options = parser.parse_args()
    processes.handle(signal.default_int_handler, signal.SIGTERM)
    with local_cluster(nodes=options.nodes, cpus=options.cpus) as running:
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
