"""Where a command's MODEL argument leads: a run, a checkpoint, or a registered model."""

from bcm.checkpoint import INDEX, load_model
from bcm.inference import SCHEDULES, Toolkit
from bcm.timesteps import PAPER_CIFAR10, TimeSteps, from_dict, to_dict
from bcm.types import BCMError
from data import storage
from pipelines import registry, runs, tracking
from pipelines.config import ConfigError

REGISTERED = "models:/"
_REMEDY = "Remove that file to go back to the paper's time steps, then run pipelines.tune again."


def open_model(source: str, device: str = "cpu") -> Toolkit:
    """The model at `source` with the best time steps known for it.

    Args:
        source: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or the URL of a run or of a checkpoint.
        device: where to put the weights.
    """
    if source.startswith(REGISTERED):
        return registry.toolkit_of(tracking.resolve_uri("runs"), source, device)
    url = storage.absolute(source)
    with runs.local_checkpoint(url) as directory:
        model, info = load_model(directory, device)
    return Toolkit(model=model, network=info.network, k=info.k, schedules=schedules_of(url))


def run_of(source: str) -> str:
    """URL of the run that `source`, a run or one of its checkpoints, belongs to."""
    url = storage.absolute(source).rstrip("/")
    return url.rpartition("/")[0] if storage.exists(storage.join(url, INDEX)) else url


def schedules_of(source: str) -> dict[str, TimeSteps]:
    """The tuned time steps stored with a run, and the paper's where none were tuned."""
    return PAPER_CIFAR10 | _tuned(storage.join(run_of(source), SCHEDULES))


def store_schedules(run_url: str, schedules: dict[str, TimeSteps]) -> None:
    """Keep tuned time steps with the run, beside those tuned before."""
    path = storage.join(run_url, SCHEDULES)
    storage.write_json(path, {name: to_dict(steps) for name, steps in (_tuned(path) | schedules).items()})


def _tuned(path: str) -> dict[str, TimeSteps]:
    entries = storage.read_json(path) if storage.exists(path) else {}
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ConfigError(f"{path} does not hold time steps by name. {_REMEDY}")
    try:
        return {name: from_dict(entry) for name, entry in entries.items()}
    except BCMError as error:
        raise ConfigError(f"{path}: {error} {_REMEDY}") from error
