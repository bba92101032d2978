"""Ctrl-C and SIGTERM while Ray runs in this process: Ray replaces their handlers and does not put them back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def _can_handle() -> bool:
    """Python lets only the main thread set handlers."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put the handlers of Ctrl-C and SIGTERM back at the end of the block."""
    if not _can_handle():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_on_sigterm() -> None:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that context managers clean up."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if _can_handle():
        signal.signal(signal.SIGTERM, leave)


def ignore() -> None:
    """A second Ctrl-C must not stop the cleaning up."""
    if _can_handle():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
