"""Runs in storage: what a run was started with, and where its checkpoints are."""

import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bcm.checkpoint import INDEX, save_checkpoint
from bcm.precond import BCM
from bcm.training import TrainState
from bcm.types import BCMError
from cluster.runtime_env import SHA_VARIABLE, git_sha
from cluster.session import in_job
from data import store
from data.errors import DataError
from pipelines.config import Config, flatten
from pipelines.errors import ConfigError, nearest

RECORD = "run.json"
CHECKPOINT_PREFIX = "checkpoint_"
RAY_RECORD = "checkpoint_manager_snapshot.json"


def durable(url: str, option: str) -> str:
    """`url` made absolute; in a job, a path relative to its working directory, which is thrown away, is refused."""
    if in_job() and store.is_local(url) and not Path(url.removeprefix("file://")).is_absolute():
        raise ConfigError(
            f"{option} {url} lies in the job's working directory, which is thrown away. "
            "Give a URL, such as s3://BUCKET/PATH, or an absolute path that all nodes share."
        )
    return store.absolute(url)


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
    config: dict[str, Any]
    """`Config.to_dict()`."""
    init: str = ""
    """The trained model it started from; empty for a start from random weights."""
    init_sha256: str = ""
    """SHA-256 of that model's weights."""

    @property
    def url(self) -> str:
        """Where the run is."""
        return store.join(self.storage, self.name)

    @property
    def first_checkpoint(self) -> str | None:
        """URL of the checkpoint that every worker starts from; None for a start from random weights."""
        return store.join(self.url, checkpoint_name(0)) if self.init else None

    def notes(self, config: Config, k: int, unsent: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """What a checkpoint after iteration `k` says of the run; `unsent`: metrics that MLflow has not got yet."""
        names = ("mlflow_run", "manifest_sha256", "code", "init", "init_sha256")
        images_seen = k * config.train.batch_size
        return {"run": self.name, **{name: getattr(self, name) for name in names}} | {
            "config": config.to_dict(),
            "images_seen": images_seen,
            "unsent": list(unsent),
        }


@dataclass(frozen=True)
class Initial:
    """A trained model to start from."""

    model: BCM
    """Its weights in the network that is to be trained."""
    source: str
    """Where it came from, as the user named it."""
    sha256: str
    """SHA-256 of its weights as they were there."""


def new_name(recipe: str) -> str:
    """A name no other run has: recipe, UTC time and four random digits."""
    return f"{recipe}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def code_version() -> str:
    """The commit of this code: noted at submission for a job, else asked of git."""
    return os.environ.get(SHA_VARIABLE) or git_sha(Path(__file__).resolve().parents[2])


def write_run(run: Run) -> None:
    """Store the record."""
    store.write_json(store.join(run.url, RECORD), asdict(run))


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
    entry = store.read_json(path)
    if not _is_record(entry):
        raise ConfigError(f"{path} is not the record of a run: it is damaged, or of another version. Choose another.")
    if entry["name"] != name:
        raise ConfigError(f"{url} is the run {entry['name']} under another name; rename the folder back to that.")
    Config.from_dict(entry["config"])
    return Run(**{**entry, "storage": parent})


def _is_record(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) != {field.name for field in fields(Run)}:
        return False
    texts = [value for key, value in entry.items() if key != "config"]
    return isinstance(entry["config"], dict) and all(isinstance(text, str) for text in texts)


def check_same(run: Run, config: Config, manifest_sha256: str) -> None:
    """Refuse to resume `run` with another config or data set; only `scaling` may change."""
    before, now = flatten(run.config), flatten(config.to_dict())
    changed = [key for key in now if not key.startswith("scaling.") and _plain(before.get(key)) != _plain(now[key])]
    if changed:
        shown = "; ".join(f"{key} was {before.get(key)}, now {now[key]}" for key in changed)
        raise ConfigError(
            f"run {run.name} cannot be resumed with other options: {shown}. Give the same, or start anew."
        )
    if run.manifest_sha256 != manifest_sha256:
        raise ConfigError(f"run {run.name} was trained on another data set than {run.data} holds now. Start a new run.")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def store_first_checkpoint(run: Run, config: Config, model: BCM) -> None:
    """Store `model` as the checkpoint of step 0, so that workers on any node, started at any time, begin with it."""
    assert run.first_checkpoint
    state = idle_state(model, config)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), state, config.network, run.notes(config, 0))
        upload_checkpoint(Path(folder), run.first_checkpoint)


def idle_state(model: BCM, config: Config) -> TrainState:
    """A state to save or to load on this machine's CPU; without the switches of training, which may need a GPU."""
    return TrainState(model, replace(config.train, channels_last=False), conditional=config.network.classes > 0)


def upload_checkpoint(folder: Path, url: str) -> None:
    """Copy the files of a local checkpoint to `url`; its index goes last, as without it there is no checkpoint."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == INDEX):
        store.write_bytes(store.join(url, path.name), path.read_bytes())


def checkpoint_name(k: int) -> str:
    """The folder of the checkpoint after iteration `k`; names sort by time."""
    return f"{CHECKPOINT_PREFIX}{k:09d}"


def committed(run_url: str) -> list[str] | None:
    """Names of the checkpoints, oldest first, that Ray Train's own record says were stored whole.

    None if there is no such record, or it cannot be read (a kill can cut it), or it names a checkpoint that is gone.
    """
    path = store.join(run_url, RAY_RECORD)
    if not store.exists(path):
        return None
    try:
        results = store.read_json(path)["checkpoint_results"]
        names = sorted(str(result["checkpoint_dir_name"]) for result in results)
    except (DataError, KeyError, TypeError):
        return None
    return names if all(store.exists(store.join(run_url, name, INDEX)) for name in names) else None


def checkpoints(run_url: str) -> list[str]:
    """Names of a run's checkpoints, oldest first: those in Ray's record, or without it those with an index."""
    if (recorded := committed(run_url)) is not None:
        return recorded
    names = sorted(name for name in store.list_names(run_url) if name.startswith(CHECKPOINT_PREFIX))
    return [name for name in names if store.exists(store.join(run_url, name, INDEX))]


def forget_damaged_record(run_url: str) -> None:
    """Remove a record of Ray Train's that it could not start from."""
    path = store.join(run_url, RAY_RECORD)
    if committed(run_url) is None and store.exists(path):
        store.remove(path)


def latest_checkpoint(run_url: str) -> str:
    """URL of the newest finished checkpoint of a run."""
    if names := checkpoints(run_url):
        return store.join(run_url, names[-1])
    raise ConfigError(f"run {run_url} has no finished checkpoint yet: train it on, with --resume.")


@contextmanager
def local_checkpoint(url: str) -> Iterator[Path]:
    """A local copy of the checkpoint at `url`, which may be a run (its newest is taken) or a checkpoint itself."""
    checkpoint = url if store.exists(store.join(url, INDEX)) else latest_checkpoint(read_run(url).url)
    with tempfile.TemporaryDirectory(prefix="bcm-checkpoint-") as folder:
        store.download_tree(checkpoint, folder)
        try:
            yield Path(folder)
        except BCMError as error:
            # The copy is gone when somebody reads the message.
            raise BCMError(str(error).replace(folder, checkpoint)) from error


def describe(config: Config) -> Mapping[str, Any]:
    """The config as MLflow parameters."""
    return flatten(config.to_dict())
