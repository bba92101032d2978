"""Where MLflow is, what a run holds there, and what is said when it cannot be used."""

import json
import math
import socket
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from servers import free_port
from tracked import history, new_run

from pipelines.errors import TrackingError
from pipelines.tracking import client as tracking


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
