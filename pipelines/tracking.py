"""Runs, parameters, metrics and files in MLflow; a tracking outage never stops training.

Only this module, `registry` and `serving` know MLflow; they import it where it is used, for that takes seconds.
"""

import json
import logging
import math
import os
import re
import sqlite3
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from mlflow import MlflowClient

URI_VARIABLE = "MLFLOW_TRACKING_URI"
MARKER = "step"
"""The metric that every point carries: its highest step in the store is what has been logged."""
SERVER_COMMAND = "mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///mlflow.db"

_ANSWER_SECONDS = 15.0
_SEND_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 60.0
_METRICS_PER_BATCH = 1000
_ENTRIES_PER_BATCH = 100
_PARAM_CHARACTERS = 6000
_SQLITE = "sqlite:///"
# MLflow's own defaults keep a caller waiting for minutes; a user's setting wins over these.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

Result = TypeVar("Result")


class TrackingError(Exception):
    """MLflow cannot be used; the message names the URI, what is wrong and the remedy, and holds no password."""


@dataclass(frozen=True)
class Point:
    """The metrics of one step."""

    step: int
    time_ms: int
    """When they were measured, milliseconds since 1970."""
    values: dict[str, float]
    """By name; NaN and infinities are allowed."""

    def to_dict(self) -> dict[str, Any]:
        """A form that strict JSON can hold: non-finite values become strings."""
        values = {name: value if math.isfinite(value) else str(value) for name, value in self.values.items()}
        return {"step": self.step, "time_ms": self.time_ms, "values": values}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "Point":
        """The inverse of `to_dict`."""
        values = {str(name): float(value) for name, value in entry["values"].items()}
        return cls(int(entry["step"]), int(entry["time_ms"]), values)


def resolve_uri(default_root: str | Path) -> str:
    """Where MLflow is: `MLFLOW_TRACKING_URI`, or else an sqlite store in the local folder `default_root`.

    The result is absolute, for worker processes have another current directory.
    """
    uri = os.environ.get(URI_VARIABLE, "").strip()
    if not uri:
        if "://" in str(default_root):
            raise TrackingError(f"MLflow's local store cannot be in {default_root}; set {URI_VARIABLE} to a server.")
        uri = f"{_SQLITE}{Path(default_root) / 'mlflow.db'}"
    if not uri.startswith(_SQLITE):
        return uri
    path = Path(uri.removeprefix(_SQLITE)).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(f"MLflow's local store {path} cannot be made: {error}. {_remedy(uri)}") from error
    return f"{_SQLITE}{path}"


def is_local(uri: str) -> bool:
    """Whether `uri` is a store that only this machine can reach."""
    return uri.split(":", 1)[0] in ("sqlite", "file") or "://" not in uri


def start_run(uri: str, *, experiment: str, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> str:
    """Create a run, and its experiment when needed; the run id.

    Args:
        uri: from `resolve_uri`.
        experiment: name of the experiment.
        name: name of the run.
        params: flat; values longer than MLflow's 6000 characters are cut.
        tags: flat.

    Raises:
        TrackingError: MLflow does not answer within about 15 seconds, or refuses.
    """
    client = connect(uri)
    with reported(uri, f"the run {name!r} cannot be started"):
        from mlflow.entities import Param, RunTag

        run_id: str = client.create_run(_experiment_id(client, uri, experiment), run_name=name).info.run_id
        entries: list[Param | RunTag] = [Param(key, str(value)[:_PARAM_CHARACTERS]) for key, value in params.items()]
        entries += [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(entries), _ENTRIES_PER_BATCH):
            batch = entries[start : start + _ENTRIES_PER_BATCH]
            client.log_batch(
                run_id,
                params=[entry for entry in batch if isinstance(entry, Param)],
                tags=[entry for entry in batch if isinstance(entry, RunTag)],
            )
    return run_id


def continue_run(uri: str, run_id: str) -> None:
    """Set an earlier run to running again; a run that the store does not know is a `TrackingError`."""
    client = connect(uri)
    with reported(uri, f"the run {run_id} cannot be continued"):
        client.update_run(run_id, status="RUNNING")


def finish_run(uri: str, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """Note how a run ended."""
    client = connect(uri)
    with reported(uri, f"the end of run {run_id} cannot be noted"):
        client.set_terminated(run_id, status)


def log_json(uri: str, run_id: str, name: str, value: object) -> None:
    """Store `value` as the JSON artifact `name`, which may contain folders."""
    client = connect(uri)
    with reported(uri, f"{name} cannot be stored with run {run_id}"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).name
        path.write_text(json.dumps(value, indent=1))
        parent = str(Path(name).parent)
        client.log_artifact(run_id, str(path), None if parent == "." else parent)


def log_file(uri: str, run_id: str, path: Path) -> None:
    """Store a file as an artifact of a run."""
    client = connect(uri)
    with reported(uri, f"{path} cannot be stored with run {run_id}"):
        client.log_artifact(run_id, str(path))


def log_scores(uri: str, run_id: str, scores: Mapping[str, float], step: int | None = None) -> None:
    """Log results that are measured once, such as an evaluation after `step` training steps."""
    client = connect(uri)
    with reported(uri, f"the scores of run {run_id} cannot be logged"):
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(name, value, now, step or 0) for name, value in scores.items()])


class MetricLog:
    """The metrics of one training run, sent by a background thread; each step is logged exactly once.

    Training never waits for MLflow: during an outage points are kept in order and sent later. After a crash the new
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
                    _warn(f"MLflow at {redacted(self._uri)} fails ({_cause(error)}); metrics are kept and sent later")
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
        client = _client(self._uri)
        if logged is None:
            logged = int(client.get_run(self._run_id).data.metrics.get(MARKER, -1))
        while batch := self._next_batch(logged):
            _send_points(client, self._run_id, batch)
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


def connect(uri: str) -> "MlflowClient":
    """A client whose store has answered; `TrackingError` within about 15 seconds otherwise."""
    with reported(uri, "it cannot be used"):
        if uri.startswith(_SQLITE):
            # MLflow would retry a file that cannot be opened for minutes.
            with closing(sqlite3.connect(uri.removeprefix(_SQLITE).split("?")[0])) as database:
                database.execute("PRAGMA schema_version")
            return _client(uri)
        return _within(_ANSWER_SECONDS, lambda: _answering_client(uri))


@contextmanager
def reported(uri: str, problem: str) -> Iterator[None]:
    """Turn what MLflow and its transports raise into a `TrackingError` that says `problem`."""
    _prepare_mlflow()
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    handled = sys.exception()
    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, requests.RequestException, OSError, ImportError) as error:
        message = f"MLflow at {redacted(uri)}: {problem} ({_cause(error, handled)}). {_remedy(uri)}"
        raise TrackingError(message) from None


def redacted(text: str) -> str:
    """`text` with the user and password of every URL in it blotted out."""
    return re.sub(r"://[^/@\s]*@", "://***@", text)


def _prepare_mlflow() -> None:
    """Import MLflow with patience, privacy and quiet of our choice."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


@cache
def _client(uri: str) -> "MlflowClient":
    _prepare_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _answering_client(uri: str) -> "MlflowClient":
    client = _client(uri)
    client.search_experiments(max_results=1)
    return client


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """The result of `call`, or `TimeoutError`; the abandoned call ends with the process."""
    outcome: list[Result] = []
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    for error in errors:
        raise error from error.__cause__ or error.__context__  # raising anew would replace the context
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return outcome[0]


def _experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        # MLflow would put the artifacts of a local store under the current directory.
        local = str(Path(uri.removeprefix(_SQLITE)).parent / "artifacts") if uri.startswith(_SQLITE) else None
        with suppress(MlflowException):  # another process was quicker
            return client.create_experiment(name, artifact_location=local)
        found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow at {redacted(uri)}: the experiment {name!r} is deleted. Choose another name, "
            "or bring it back with `mlflow experiments restore`."
        )
    return found.experiment_id


def _send_points(client: "MlflowClient", run_id: str, points: Sequence[Point]) -> None:
    from mlflow.entities import Metric

    client.log_batch(
        run_id,
        metrics=[
            Metric(name, value, point.time_ms, point.step)
            for point in points
            for name, value in {MARKER: float(point.step), **point.values}.items()
        ],
    )


def _cause(error: Exception, handled: BaseException | None = None) -> str:
    """One short line: the operating system's error at the root of the chain, where there is one.

    The chain ends at `handled`, which the caller of MLflow was handling already.
    """
    root: BaseException = error
    while (inner := root.__cause__ or root.__context__) and inner is not handled:
        root = inner
    shown = root if isinstance(root, OSError) else error
    line = redacted(" ".join(str(shown).split())) or type(shown).__name__
    return line if len(line) <= 300 else f"{line[:297]}..."


def _remedy(uri: str) -> str:
    if uri.startswith(_SQLITE):
        return f"Check that the file can be written, or set {URI_VARIABLE} to a server."
    return (
        f"Start a server with `{SERVER_COMMAND}` and set {URI_VARIABLE} to its address, "
        f"or unset {URI_VARIABLE} to use a local store."
    )


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
