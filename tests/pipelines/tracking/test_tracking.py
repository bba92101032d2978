"""Runs and metrics in a real store: complete, in order and without duplicates, whatever breaks."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from servers import free_port, mlflow_server

from bcm import strict
from pipelines.errors import TrackingError
from pipelines.tracking import client as tracking
from pipelines.tracking.metriclog import MARKER, MetricLog, Point

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A local sqlite store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(tracking.URI_VARIABLE, raising=False)
        return tracking.resolve_uri(tmp_path_factory.mktemp("local store"))


def new_run(uri: str) -> str:
    return tracking.start_run(uri, experiment="digits", name="a run", params={}, tags={})


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric as the store has it, in the order of logging."""
    metrics = tracking.connect(uri).get_metric_history(run_id, name)
    return [(metric.step, metric.value) for metric in metrics]


def by_step(steps: range) -> list[tuple[int, float]]:
    return [(step, step / 8) for step in steps]


def test_the_environment_names_the_store_and_a_local_one_is_made_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(tracking.URI_VARIABLE, "http://127.0.0.1:5000")
    assert tracking.resolve_uri(tmp_path) == "http://127.0.0.1:5000"
    monkeypatch.setenv(tracking.URI_VARIABLE, " ")
    assert tracking.resolve_uri(tmp_path / "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert (tmp_path / "runs").is_dir()
    monkeypatch.delenv(tracking.URI_VARIABLE)
    with pytest.raises(TrackingError, match="set MLFLOW_TRACKING_URI"):
        tracking.resolve_uri("s3://bucket/runs")


def test_relative_local_stores_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(tracking.URI_VARIABLE, "sqlite:///here.db")
    assert tracking.resolve_uri("/elsewhere") == f"sqlite:///{tmp_path}/here.db"
    monkeypatch.delenv(tracking.URI_VARIABLE)
    assert tracking.resolve_uri("runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        ("sqlite:////a/b.db", True),
        ("./mlruns", True),
        ("file:///a", True),
        ("http://h:1", False),
        ("postgresql://h/d", False),
    ],
)
def test_is_local(uri: str, local: bool):
    assert tracking.is_local(uri) == local


def test_a_run_holds_its_parameters_tags_scores_and_files(store: str):
    params = {**{f"train.option_{i}": i for i in range(150)}, "long": "x" * 7000, "none": None}
    run_id = tracking.start_run(store, experiment="digits", name="first", params=params, tags={"git": "abc"})
    tracking.log_json(store, run_id, "config/run.json", {"a": [1, 2]})
    tracking.log_scores(store, run_id, {"fid": 1.5, "mse": math.nan}, step=9)
    tracking.finish_run(store, run_id, "KILLED")

    run = tracking.connect(store).get_run(run_id)
    assert run.data.params == {key: str(value)[:6000] for key, value in params.items()}
    assert (run.data.tags["git"], run.info.run_name, run.info.status) == ("abc", "first", "KILLED")
    assert history(store, run_id, "fid") == [(9, 1.5)]
    assert math.isnan(history(store, run_id, "mse")[0][1])
    artifacts = Path(unquote(urlsplit(str(run.info.artifact_uri)).path))
    assert artifacts.is_relative_to(Path(store.removeprefix("sqlite:///")).parent)
    assert json.loads((artifacts / "config" / "run.json").read_text()) == {"a": [1, 2]}

    tracking.continue_run(store, run_id)
    again = tracking.connect(store).get_run(run_id)
    assert (again.info.status, again.info.experiment_id) == ("RUNNING", run.info.experiment_id)


def test_an_unknown_run_cannot_be_continued(store: str):
    with pytest.raises(TrackingError, match="the run 0123 cannot be continued"):
        tracking.continue_run(store, "0123")


def test_a_deleted_experiment_is_named_with_the_remedy(store: str):
    new_run(store)
    client = tracking.connect(store)
    experiment = client.create_experiment("gone")
    client.delete_experiment(experiment)
    with pytest.raises(TrackingError, match="the experiment 'gone' is deleted"):
        tracking.start_run(store, experiment="gone", name="a", params={}, tags={})


@pytest.mark.parametrize("kind", ["refused", "no database", "cannot be opened", "unknown scheme"])
def test_an_unusable_store_is_one_message_with_the_remedy_and_no_password(kind: str, tmp_path: Path):
    (tmp_path / "text.db").write_text("no database, but long enough to have a header" * 10)
    uri = {
        "refused": f"http://someone:pass-word@127.0.0.1:{free_port()}",
        "no database": f"sqlite:///{tmp_path}/text.db",
        "cannot be opened": "sqlite:////proc/mlflow.db",
        "unknown scheme": "gopher://someone:pass-word@host",
    }[kind]
    start = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        new_run(uri)
    message = str(caught.value)
    assert tracking.redacted(uri) in message
    assert tracking.URI_VARIABLE in message
    assert "pass-word" not in message
    assert time.monotonic() - start < 15


def test_the_cause_is_mlflows_and_not_the_error_being_handled():
    try:
        raise FileNotFoundError("shard lost")
    except FileNotFoundError:
        with pytest.raises(TrackingError, match="Connection refused"):
            tracking.finish_run(f"http://127.0.0.1:{free_port()}", "0123", "FAILED")


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracking, "_ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TrackingError, match=rf"{uri}: .*no answer within 1 seconds.*`mlflow server "):
            new_run(uri)


def test_points_survive_json():
    point = Point(3, 17, {"loss": 0.1, "a": math.nan, "b": math.inf, "c": -math.inf})
    copy = strict.read(Point, json.dumps(strict.dump(point)), "point", complete=True)
    assert math.isnan(copy.values.pop("a")) and math.isnan(point.values.pop("a"))
    assert copy == point


def test_every_point_is_logged_once_and_in_order(store: str):
    run_id = new_run(store)
    log = MetricLog(store, run_id)
    for step in range(1500):
        log.log(step, {"loss": step / 8, "nan": math.nan, "inf": math.inf})
    assert log.flush(60) == []
    log.close()
    assert history(store, run_id, "loss") == by_step(range(1500))
    assert history(store, run_id, MARKER) == [(step, float(step)) for step in range(1500)]
    assert all(math.isnan(value) for _, value in history(store, run_id, "nan"))
    assert history(store, run_id, "inf")[0][1] > 1e300


def test_points_are_sent_without_a_flush(store: str):
    run_id = new_run(store)
    log = MetricLog(store, run_id)
    log.log(1, {"loss": 1 / 8})
    deadline = time.monotonic() + 30
    while not history(store, run_id, "loss") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert history(store, run_id, "loss") == by_step(range(1, 2))
    log.close()


def test_a_resumed_run_sends_what_was_unsent_and_drops_what_is_there(store: str):
    run_id = new_run(store)
    first = MetricLog(store, run_id)
    for step in range(30):
        first.log(step, {"loss": step / 8})
    assert first.flush(60) == []
    first.close()
    # The checkpoint was written at step 20 with 15 to 19 unsent; they reached the store later, as 20 to 29 did.
    unsent = [Point(step, 1, {"loss": step / 8}) for step in range(15, 20)]
    second = MetricLog(store, run_id, unsent)
    for step in range(20, 40):
        second.log(step, {"loss": step / 8})
    assert second.flush(60) == []
    second.close()
    assert history(store, run_id, "loss") == by_step(range(40))


def test_a_repeated_step_is_dropped_with_a_warning(store: str, capsys: pytest.CaptureFixture[str]):
    run_id = new_run(store)
    log = MetricLog(store, run_id)
    for step in (1, 1, 0, 2):
        log.log(step, {"loss": step / 8})
    assert log.flush(60) == []
    log.close()
    assert history(store, run_id, "loss") == by_step(range(1, 3))
    assert capsys.readouterr().err.count("are dropped") == 2


KILLED = """
import json, sys, time
from bcm import strict
from pipelines.tracking.metriclog import MetricLog
uri, run_id, checkpoint = sys.argv[1:]
log = MetricLog(uri, run_id)
for step in range(10_000):
    log.log(step, {"loss": step / 8})
    if step == 40:
        unsent = log.flush(0.0)
        open(checkpoint, "w").write(json.dumps([strict.dump(point) for point in unsent]))
    time.sleep(0.01)
"""


@pytest.mark.slow
def test_kill_9_and_resume_leave_no_gap_and_no_duplicate(store: str, tmp_path: Path):
    run_id, checkpoint = new_run(store), tmp_path / "unsent.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([sys.executable, "-c", KILLED, store, run_id, str(checkpoint)], env=environment)
    try:
        deadline = time.monotonic() + 90
        while len(history(store, run_id, "loss")) < 60 and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    logged = len(history(store, run_id, "loss"))
    unsent = strict.read(list[Point], checkpoint.read_text(), "unsent")
    assert unsent, "the checkpoint should have been written before anything was sent"

    resumed = MetricLog(store, run_id, unsent)
    for step in range(41, logged + 20):
        resumed.log(step, {"loss": step / 8})
    assert resumed.flush(60) == []
    resumed.close()
    assert history(store, run_id, "loss") == by_step(range(logged + 20))


class Gate:
    """A TCP forwarder at a fixed port: the server behind it may go away, come back, or have its answers lost."""

    def __init__(self) -> None:
        self.target: int | None = None
        self.lose_answers = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self.target or 1))
                except OSError:
                    client.close()
                    continue
                for ends in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError), source, sink:
            while data := source.recv(65536):
                if answers and self.lose_answers:
                    self.lose_answers -= 1
                    sink.shutdown(socket.SHUT_RDWR)
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.close()


@pytest.mark.slow
def test_outages_of_a_server_leave_no_gap_and_no_duplicate(
    gate: Gate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with mlflow_server(tmp_path, str(tmp_path / "artifacts"), {}) as url:
        gate.target = int(url.rpartition(":")[2])
        run_id = new_run(gate.url)
        log = MetricLog(gate.url, run_id)
        for step in range(20):
            log.log(step, {"loss": step / 8})
        assert log.flush(60) == []

        # The batch arrives, and neither its answer nor those of the client's own retries.
        for step in range(20, 30):
            log.log(step, {"loss": step / 8})
        gate.lose_answers = 3
        assert [point.step for point in log.flush(60)] == list(range(20, 30))
        assert history(url, run_id, "loss") == by_step(range(30))
        for step in range(30, 40):
            log.log(step, {"loss": step / 8})
        assert log.flush(60) == []
        assert history(url, run_id, "loss") == by_step(range(40))

    start = time.monotonic()
    for step in range(40, 60):
        log.log(step, {"loss": step / 8})
    assert time.monotonic() - start < 0.1
    assert [point.step for point in log.flush(60)] == list(range(40, 60))
    capsys.readouterr()

    with mlflow_server(tmp_path, str(tmp_path / "artifacts"), {}) as url:
        gate.target = int(url.rpartition(":")[2])
        log.log(60, {"loss": 60 / 8})
        while log.flush(60):
            pass
        log.close()
        assert history(url, run_id, "loss") == by_step(range(61))
        printed = capsys.readouterr().err.splitlines()
    assert [line for line in printed if "warning" in line] == [
        f"warning: MLflow at {gate.url} is back; all metrics up to step 60 are logged"
    ]
