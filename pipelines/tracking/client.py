"""Runs, parameters, metrics and files in MLflow; a tracking outage never stops training.

The modules of this room alone know MLflow; they import it where it is used, for that takes seconds.
"""

import json
import logging
import os
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote, unquote

from data import store
from pipelines.errors import TrackingError
from pipelines.evaluation.scores import Score

if TYPE_CHECKING:
    from mlflow import MlflowClient

URI_VARIABLE = "MLFLOW_TRACKING_URI"
SERVER_COMMAND = "mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///mlflow.db"

_ANSWER_SECONDS = 15.0
_ENTRIES_PER_BATCH = 100
_PARAM_CHARACTERS = 6000
_SQLITE = "sqlite:///"
_PLAIN = "/ ~+,:=@!$&'()*[]|"
"""What may stand in an sqlite URI as it is."""
# MLflow's own defaults keep a caller waiting for minutes; a user's setting wins over these.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def resolve_uri(default_root: str | Path) -> str:
    """Where MLflow is: `MLFLOW_TRACKING_URI`, or else an sqlite store in the local folder `default_root`.

    The result is absolute, for worker processes have another current directory.
    """
    uri = os.environ.get(URI_VARIABLE, "").strip()
    if not uri:
        if "://" in str(default_root):
            raise TrackingError(f"MLflow's local store cannot be in {default_root}; set {URI_VARIABLE} to a server.")
        uri = f"{_SQLITE}{quote(str(Path(default_root) / 'mlflow.db'))}"
    if not uri.startswith(_SQLITE):
        return uri
    path = _database(uri)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(f"MLflow's local store {path} cannot be made: {error}. {_remedy(uri)}") from error
    _, sign, query = uri.partition("?")
    return f"{_SQLITE}{quote(str(path), safe=_PLAIN)}{sign}{query}"


def _database(uri: str) -> Path:
    """The file of an sqlite store; SQLAlchemy takes %20 in its URI for a blank."""
    return Path(unquote(uri.removeprefix(_SQLITE).partition("?")[0])).absolute()


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


def log_scores(uri: str, run_id: str, scores: Mapping[str, float], step: int | None = None) -> None:
    """Log results that are measured once, such as an evaluation after `step` training steps."""
    client = connect(uri)
    with reported(uri, f"the scores of run {run_id} cannot be logged"):
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(name, value, now, step or 0) for name, value in scores.items()])


def score_names(rows: Sequence[Score]) -> dict[str, float]:
    """What scores are called in MLflow: `frechet_nfe1`, `frechet_ratio_nfe1` (over the test images'), `mse_nfe4`.

    These names are made here and never read back.
    """
    real = next((row.value for row in rows if row.task == "real"), None)
    names: dict[str, float] = {}
    for row in rows:
        name = {"fd-pixels": "frechet", "mse": "mse", "labels-kept": "labels_kept"}[row.metric]
        names[f"{name}_test" if row.task == "real" else f"{name}_nfe{row.nfe}"] = row.value
        if row.task == "sample" and real is not None:
            names[f"{name}_ratio_nfe{row.nfe}"] = row.value / real
    return names


def check_run(uri: str, run_id: str, name: str) -> None:
    """Refuse, before the work starts, an MLflow that is down or does not know the run `name`."""
    client = connect(uri)
    with reported(uri, f"the run {run_id} of {name} cannot be found"):
        client.get_run(run_id)


def connect(uri: str) -> "MlflowClient":
    """A client whose store has answered; `TrackingError` within about 15 seconds otherwise."""
    with reported(uri, "it cannot be used"):
        if uri.startswith(_SQLITE):
            # MLflow would retry a file that cannot be opened for minutes.
            with closing(sqlite3.connect(_database(uri))) as database:
                database.execute("PRAGMA schema_version")
            return client_of(uri)
        client = client_of(uri)
        store.within(_ANSWER_SECONDS, lambda: client.search_experiments(max_results=1))
        return client


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
        message = f"MLflow at {redacted(uri)}: {problem} ({cause(error, handled)}). {_remedy(uri)}"
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
def client_of(uri: str) -> "MlflowClient":
    """A client, the same for each call; whether its store answers is not asked."""
    _prepare_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # MLflow would put the artifacts of a local store under the current directory, and takes a path for a URL.
        local = (_database(uri).parent / "artifacts").as_uri() if uri.startswith(_SQLITE) else None
        with suppress(MlflowException):  # another process was quicker
            return client.create_experiment(name, artifact_location=local)
        experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow at {redacted(uri)}: the experiment {name!r} is deleted. Choose another name, "
            "or bring it back with `mlflow experiments restore`."
        )
    return experiment.experiment_id


def cause(error: Exception, handled: BaseException | None = None) -> str:
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
