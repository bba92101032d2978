"""What every test stands on."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

# A shell's background job ignores Ctrl-C, and what it starts inherits that; the tests send Ctrl-C to what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"reference data not found at {SHARED}")
    return SHARED


@pytest.fixture
def peak_memory() -> Callable[[Callable[[], object]], int]:
    """Runs some work on the CPU; returns the bytes of all tensors that were there at the fullest moment of it."""
    from torch.profiler import ProfilerActivity, profile

    def measure(work: Callable[[], object]) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            work()
        events: list[Any] = profiled.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess, reportAssignmentType]
        alive = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                alive += event.nbytes()
                peak = max(peak, alive)
        return peak

    return measure
