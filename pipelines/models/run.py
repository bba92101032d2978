"""The record of a training run: what it was started with."""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from bcm import strict
from bcm.checkpoint import save_checkpoint
from bcm.timesteps import TimeSteps
from bcm.training import TrainState
from cluster.runtime_env import SHA_VARIABLE, git_sha
from data import store
from pipelines.config import Config
from pipelines.errors import ConfigError, nearest
from pipelines.tracking.metriclog import Point

RECORD = "run.json"
NOTES = "notes.json"
"""What a checkpoint of a run holds beside weights and optimizer."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The record `run.json` of a training run, written once when it starts."""

    name: str
    """Name of the run, its folder in storage."""
    storage: str
    """URL of the folder that holds the run's folder."""
    data: str
    """URL of the data set."""
    manifest_sha256: str
    """Which data set that was."""
    mlflow_run: str
    """Id of its one run in MLflow."""
    code: str
    """Git commit of the code that started it."""
    config: Config
    """What it computes."""
    schedules: Mapping[str, TimeSteps]
    """The published time steps that it starts with, by task and NFE; its config names them, and here they stand."""
    init: str = ""
    """The trained model it started from; empty for a start from random weights."""
    init_sha256: str = ""
    """SHA-256 of that model's weights."""

    @property
    def url(self) -> str:
        """Where the run is."""
        return store.join(self.storage, self.name)


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What a checkpoint says of its run."""

    run: Run
    images_seen: int
    unsent: tuple[Point, ...] = ()
    """Metrics that MLflow had not got when it was saved."""


def new_name(recipe: str) -> str:
    """A name no other run has: recipe, UTC time and four random digits."""
    return f"{recipe}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def code_version() -> str:
    """The commit of this code: noted at submission for a job, else asked of git."""
    return os.environ.get(SHA_VARIABLE) or git_sha(Path(__file__).resolve().parents[2])


def write_run(run: Run) -> None:
    """Store the record."""
    store.write_json(store.join(run.url, RECORD), strict.dump(run))


def read_run(url: str) -> Run:
    """The record of the run at `url`; a missing one is a `ConfigError` that lists the runs beside it.

    Its `storage` is where it was found, which may be a copy of what the run was started in.
    """
    path = store.join(url, RECORD)
    parent, _, name = url.rstrip("/").rpartition("/")
    if not store.exists(path):
        beside = [entry for entry in store.list_names(parent) if store.exists(store.join(parent, entry, RECORD))]
        hint = nearest(name, beside) if beside else f"{parent} holds no runs. Check the URL."
        raise ConfigError(f"no run and no finished checkpoint at {url}: {hint}")
    run = strict.read(
        Run,
        store.read_bytes(path),
        path,
        lambda problem: ConfigError(f"{problem}. It is damaged, or of another version: choose another run."),
        complete=True,
    )
    if run.name != name:
        raise ConfigError(f"{url} is the run {run.name} under another name; rename the folder back to that.")
    return replace(run, storage=parent)


def save_run_checkpoint(directory: Path, state: TrainState, run: Run, unsent: Sequence[Point] = ()) -> None:
    """Write a local checkpoint of a run, with its notes."""
    notes = Notes(run=run, images_seen=state.k * run.config.train.batch_size, unsent=tuple(unsent))
    text = json.dumps(strict.dump(notes), indent=1)
    save_checkpoint(directory, state, run.config.network, {NOTES: text.encode()})
