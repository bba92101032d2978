"""The metrics of a training run on their way to MLflow: sent in the background, each step exactly once."""

import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.tracking.client import cause, client_of, redacted

MARKER = "step"
"""The metric that every point carries: its highest step in the store is what has been logged."""
_SEND_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 60.0
_METRICS_PER_BATCH = 1000


@dataclass(frozen=True)
class Point:
    """The metrics of one step."""

    step: int
    time_ms: int
    """When they were measured, milliseconds since 1970."""
    values: dict[str, float]
    """By name; NaN and infinities are allowed."""


class MetricLog:
    """The metrics of one training run, sent by a background thread; each step is logged exactly once.

    `log` never waits for MLflow: during an outage points are kept in order and sent later. After a crash the new
    process is given the points that the checkpoint held unsent and repeats the steps after the checkpoint; whatever the
    store already has is dropped. The store is asked for its highest step at the first contact and after every failure.
    """

    def __init__(self, uri: str, run_id: str, unsent: Sequence[Point] = ()) -> None:
        """Start sending; `unsent` is what `flush` of the interrupted process returned at its last checkpoint."""
        self._uri = uri
        self._run_id = run_id
        self._points = deque(unsent)
        self._highest = max((point.step for point in unsent), default=-1)
        self._changed = threading.Condition()
        self._wanted = False
        self._closed = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="metric-log", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queue up to 999 metrics of one step; steps rise, so a repeated step is dropped with a warning."""
        point = Point(step, int(time.time() * 1000), {name: float(value) for name, value in values.items()})
        with self._changed:
            if step <= self._highest:
                _warn(f"metrics of step {step} come after those of step {self._highest} and are dropped")
                return
            self._highest = step
            self._points.append(point)

    def flush(self, timeout: float) -> list[Point]:
        """Try once to send everything now, for at most `timeout` seconds; the points still unsent, in order."""
        with self._changed:
            failures = self._failures
            self._wanted = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._points or self._failures > failures, timeout)
            return list(self._points)

    def close(self) -> None:
        """Stop the thread; what `flush` did not send stays unsent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_SEND_SECONDS)

    def _run(self) -> None:
        pause, logged, down = _SEND_SECONDS, None, False
        while self._wait(pause):
            try:
                logged = self._send_all(logged)
            except Exception as error:
                if not down:
                    _warn(f"MLflow at {redacted(self._uri)} fails ({cause(error)}); metrics are kept and sent later")
                # Whether a batch whose answer was lost has arrived, the store must say.
                pause, logged, down = min(2 * pause, _LONGEST_PAUSE_SECONDS), None, True
                with self._changed:
                    self._failures += 1
                    self._changed.notify_all()
            else:
                if down and logged is not None:
                    _warn(f"MLflow at {redacted(self._uri)} is back; all metrics up to step {logged} are logged")
                    down = False
                pause = _SEND_SECONDS

    def _wait(self, pause: float) -> bool:
        """Sleep until there is a reason to send; False when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._wanted, pause)
            self._wanted = False
            return not self._closed

    def _send_all(self, logged: int | None) -> int | None:
        """Send what is queued, given the highest step in the store if known; the highest step then."""
        if not self._points:
            return logged
        from mlflow.entities import Metric

        client = client_of(self._uri)
        if logged is None:
            logged = int(client.get_run(self._run_id).data.metrics.get(MARKER, -1))
        while batch := self._next_batch(logged):
            metrics = [
                Metric(name, value, point.time_ms, point.step)
                for point in batch
                for name, value in {MARKER: float(point.step), **point.values}.items()
            ]
            client.log_batch(self._run_id, metrics=metrics)
            logged = batch[-1].step
            with self._changed:
                for _ in batch:
                    self._points.popleft()
                self._changed.notify_all()
        return logged

    def _next_batch(self, logged: int) -> list[Point]:
        """Drop the points that the store has; return, still queued, as many whole points as one request may hold."""
        with self._changed:
            while self._points and self._points[0].step <= logged:
                self._points.popleft()
            self._changed.notify_all()
            batch: list[Point] = []
            size = 0
            for point in self._points:
                size += len(point.values) + 1
                if batch and size > _METRICS_PER_BATCH:
                    break
                batch.append(point)
            return batch


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
