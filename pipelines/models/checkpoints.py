"""A run's checkpoints in storage: which are whole, which is the newest, and the files of one on this machine."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from bcm.checkpoint import INDEX, Index, local_index, read_index, verify_files, write_index
from bcm.inference import SCHEDULES, dump_schedules
from bcm.timesteps import TimeSteps
from bcm.types import BCMError
from data import store
from data.errors import DataError
from pipelines.errors import ConfigError

PREFIX = "checkpoint_"
RAY_RECORD = "checkpoint_manager_snapshot.json"


def checkpoint_name(k: int) -> str:
    """The folder of the checkpoint after iteration `k`; names sort by time."""
    return f"{PREFIX}{k:09d}"


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
    names = sorted(name for name in store.list_names(run_url) if name.startswith(PREFIX))
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


def index_of(checkpoint: str) -> Index:
    """What the checkpoint at a URL says of itself; no weights are looked at."""
    path = store.join(checkpoint, INDEX)
    return read_index(store.read_bytes(path), path)


@contextmanager
def local_copy(checkpoint: str, names: Callable[[Index], Iterable[str]]) -> Iterator[Path]:
    """A local folder with the index of the checkpoint at a URL and those of its files that `names` chooses."""
    with tempfile.TemporaryDirectory(prefix="bcm-") as parent:
        folder = Path(parent) / "checkpoint"
        try:
            store.fetch(store.join(checkpoint, INDEX), None, None, folder / INDEX)
            for name in names(local_index(folder)):
                if store.exists(url := store.join(checkpoint, name)):
                    store.fetch(url, None, None, folder / name)
            yield folder
        except BCMError as error:
            # The copy is gone when somebody reads the message.
            raise BCMError(str(error).replace(str(folder), checkpoint)) from error


def is_whole(checkpoint: str) -> bool:
    """Whether every file of the checkpoint at a URL is there as its index says."""
    try:
        with local_copy(checkpoint, lambda index: index.files) as folder:
            verify_files(folder)
    except (BCMError, DataError):
        return False
    return True


def upload(folder: Path, url: str) -> None:
    """Copy the files of a local checkpoint to `url`; its index goes last, as without it there is no checkpoint."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == INDEX):
        store.write_bytes(store.join(url, path.name), path.read_bytes())


@contextmanager
def inference_copy(
    checkpoint: str, schedules: Mapping[str, TimeSteps], ema_rate: float | None = None
) -> Iterator[Path]:
    """A local folder as `save_toolkit` writes it, of one average of a checkpoint's weights and these time steps.

    Of the checkpoint at the URL, its index and that average alone are fetched; the weights are not read here.
    """
    with local_copy(checkpoint, lambda index: [index.average(ema_rate)]) as folder:
        index = local_index(folder)
        alone = index.for_inference(ema_rate)
        for name in alone.files:
            with suppress(FileNotFoundError):
                (folder / index.average(ema_rate)).rename(folder / name)
        write_index(folder, alone)
        (folder / SCHEDULES).write_text(json.dumps(dump_schedules(schedules), indent=1))
        yield folder
