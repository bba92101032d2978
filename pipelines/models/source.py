"""Where a command's MODEL argument leads: a run, a checkpoint, an imported model, or a registered model.

An imported model is a folder that holds a checkpoint's files beside its time steps; it has no run.
"""

from bcm.checkpoint import INDEX, load_model
from bcm.inference import SCHEDULES, Toolkit, paper_schedules
from bcm.networks import NetworkConfig, network_from_dict
from bcm.timesteps import TimeSteps, from_dict, to_dict
from bcm.types import BCMError
from data import store
from pipelines.errors import ConfigError
from pipelines.tracking import client as tracking
from pipelines.tracking import registry
from pipelines.training import run as runs

REGISTERED = "models:/"
_REMEDY = "Remove that file to go back to the paper's time steps, then run pipelines.tune again."


def open_model(source: str, device: str = "cpu", ema_rate: float | None = None) -> Toolkit:
    """The model at `source` with the best time steps known for it.

    Args:
        source: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or the URL of a run, a checkpoint or an imported model.
        device: where to put the weights.
        ema_rate: which of the averages that a run kept; by default the first, which serves.
    """
    if source.startswith(REGISTERED):
        if ema_rate is not None:
            raise ConfigError(f"{source} holds one average of the weights; leave --ema-rate out.")
        return registry.toolkit_of(tracking.resolve_uri("runs"), source, device)
    url = store.absolute(source)
    with runs.local_checkpoint(url) as directory:
        model, info = load_model(directory, device, ema_rate)
    return Toolkit.of(model, info, schedules_of(url, info.network))


def is_imported(source: str) -> bool:
    """Whether the URL `source` is a model of its own, as `pipelines.import_weights` writes it."""
    return all(store.exists(store.join(source, name)) for name in (INDEX, SCHEDULES))


def home_of(source: str) -> str:
    """URL of the folder that keeps the time steps and scores of `source`: its run's, or the imported model's own."""
    url = store.absolute(source).rstrip("/")
    of_a_run = store.exists(store.join(url, INDEX)) and not is_imported(url)
    return url.rpartition("/")[0] if of_a_run else url


def run_of(source: str) -> runs.Run | None:
    """The run that `source`, a run or one of its checkpoints, belongs to; None for a registered or imported model."""
    return None if source.startswith(REGISTERED) or is_imported(source) else runs.read_run(home_of(source))


def stated(checkpoint: str) -> tuple[int, NetworkConfig]:
    """Iterations and network of the checkpoint at a URL, by its index; the weights are not looked at."""
    path = store.join(checkpoint, INDEX)
    index = store.read_json(path)
    try:
        return int(index["k"]), network_from_dict(index["network"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}). Choose another checkpoint.") from error


def schedules_of(source: str, network: NetworkConfig) -> dict[str, TimeSteps]:
    """The time steps stored with a run or an imported model, and the published ones where none are stored."""
    return {**paper_schedules(network), **_tuned(store.join(home_of(source), SCHEDULES))}


def store_schedules(run_url: str, schedules: dict[str, TimeSteps]) -> None:
    """Keep tuned time steps with the run, beside those tuned before."""
    path = store.join(run_url, SCHEDULES)
    store.write_json(path, {name: to_dict(steps) for name, steps in (_tuned(path) | schedules).items()})


def _tuned(path: str) -> dict[str, TimeSteps]:
    entries = store.read_json(path) if store.exists(path) else {}
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ConfigError(f"{path} does not hold time steps by name. {_REMEDY}")
    try:
        return {name: from_dict(entry) for name, entry in entries.items()}
    except BCMError as error:
        raise ConfigError(f"{path}: {error} {_REMEDY}") from error
