"""Processes, signals, ports and files of a Ray started here, and how to leave none of them behind."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


def handle(handler: Any, *signals: signal.Signals) -> None:
    """Set the handler of signals; nothing happens outside the main thread, where Python does not let it."""
    if threading.current_thread() is threading.main_thread():
        for number in signals:
            signal.signal(number, handler)


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """Exit with code 141, as other programs do, where what this block prints is read no further (`| head`)."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout, 0)
        if not poll.poll(0):  # it is another pipe that broke
            raise
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put the handlers of Ctrl-C and SIGTERM back after the block: Ray replaces them and does not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            handle(handler, number)


@contextmanager
def noted(roots: list[psutil.Process]) -> Iterator[None]:
    """Add to `roots` the processes that this one starts in the block, also if it fails."""
    before = psutil.Process().children()
    try:
        yield
    finally:
        roots += [child for child in psutil.Process().children() if child not in before]


@contextmanager
def own(shutdown: Callable[[], object]) -> Iterator[tuple[Path, list[psutil.Process]]]:
    """A folder for the files of a Ray, and a list to be filled with its root processes by `noted`.

    After the block Ray is told to shut down, what still runs is killed, and the folder removed; a second Ctrl-C does
    not stop that. The folder's path leaves room for Ray's socket names (107 bytes in all).
    """
    parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="bcm-ray-", dir=parent if len(parent) < 20 else "/tmp"))
    roots: list[psutil.Process] = []
    try:
        yield folder, roots
    finally:
        handle(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM)
        processes = with_descendants(roots)
        shutdown()
        end(processes)
        # An orphaned worker may still write its last line.
        for _ in range(20):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.2)


def with_descendants(roots: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes and everything they have started that still hangs on them."""
    family = list(roots)
    for root in roots:
        try:
            family += root.children(recursive=True)
        except psutil.NoSuchProcess:
            continue
    return family


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
