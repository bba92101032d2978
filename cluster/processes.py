"""Processes, ports and folders of a Ray started here, and how to leave none of them behind."""

from __future__ import annotations

import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil


def children_since(before: Sequence[psutil.Process]) -> list[psutil.Process]:
    """This process's own children, except those in `before`."""
    return [child for child in psutil.Process().children() if child not in before]


def with_descendants(roots: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes and everything they have started that still hangs on them."""
    found = list(roots)
    for root in roots:
        try:
            found += root.children(recursive=True)
        except psutil.NoSuchProcess:
            continue
    return found


def end(processes: Sequence[psutil.Process], patience: float = 3) -> None:
    """Wait `patience` seconds for processes that have been told to end, then kill the rest."""
    _, alive = psutil.wait_procs(processes, timeout=patience)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=5)


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback interface on which nobody listens now, all different."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def short_folder() -> Path:
    """A new folder whose path leaves room for Ray's socket names (107 bytes in all)."""
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="bcm-ray-", dir=parent if len(parent) < 20 else "/tmp"))


def remove_folder(folder: Path) -> None:
    """Remove a folder into which an orphaned worker may still write its last line."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.2)
