"""Where a command's MODEL leads: a run or one of its checkpoints, an imported model, or a registered one.

Each kind has the same attributes, by which alone the rest of the code tells them apart where it must:

* `source`: its name for people, a URL or models:/NAME@ALIAS.
* `home`: URL of the folder that keeps its time steps and scores; None for a registered model, which has its own.
* `run`: the training run it comes from; None for an imported or registered model.
* `checkpoint`: URL of its checkpoint, the newest of a run when it is asked; None for a registered model.
* `schedules()`: the best time steps known for it, by task and NFE.
* `open(device, ema_rate)`: its weights with its time steps; by default the average of the weights that serves.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from bcm.checkpoint import INDEX
from bcm.inference import SCHEDULES, Toolkit, dump_schedules, load_toolkit, read_schedules
from bcm.timesteps import TimeSteps
from data import store
from pipelines.errors import ConfigError
from pipelines.models.checkpoints import inference_copy, latest_checkpoint
from pipelines.models.run import Run, read_run
from pipelines.tracking import client, registry

REGISTERED = "models:/"


@dataclass(frozen=True)
class StoredModel:
    """The model of a training run, one of its checkpoints, or a model that `pipelines.import_weights` wrote."""

    source: str
    """URL of the run, of the checkpoint, or of the imported model, which is a checkpoint too."""
    home: str
    """URL of the run, or of the imported model."""
    run: Run | None

    @property
    def checkpoint(self) -> str:
        """URL of the checkpoint."""
        return latest_checkpoint(self.home) if self.run and self.source == self.home else self.source

    def schedules(self) -> dict[str, TimeSteps]:
        """Those that a run was started with, and in their place those that were found; an imported model's own."""
        return {**(self.run.schedules if self.run else {}), **_stored(self.home)}

    def open(self, device: str = "cpu", ema_rate: float | None = None) -> Toolkit:
        """Fetches the index and one average alone."""
        with inference_copy(self.checkpoint, self.schedules(), ema_rate) as folder:
            return load_toolkit(folder, device)


@dataclass(frozen=True)
class RegisteredModel:
    """A version in the registry."""

    source: str
    """models:/NAME@ALIAS or models:/NAME/VERSION."""
    home: None = None
    run: None = None
    checkpoint: None = None

    def schedules(self) -> dict[str, TimeSteps]:
        """Those it was registered with."""
        return dict(self.open().schedules)

    def open(self, device: str = "cpu", ema_rate: float | None = None) -> Toolkit:
        """None of its own code is run."""
        if ema_rate is not None:
            raise ConfigError(f"{self.source} holds one average of the weights; leave --ema-rate out.")
        return registry.toolkit_of(client.resolve_uri("runs"), self.source, device)


Model = StoredModel | RegisteredModel


def model_at(source: str) -> Model:
    """The model that `source` names; a run or checkpoint that is not there is a `ConfigError`.

    Args:
        source: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or the URL of a run, a checkpoint or an imported model.
    """
    if source.startswith(REGISTERED):
        return RegisteredModel(source)
    url = store.absolute(source).rstrip("/")
    if not store.exists(store.join(url, INDEX)):
        run = read_run(url)
    elif store.exists(store.join(url, SCHEDULES)):
        return StoredModel(url, url, None)
    else:
        run = read_run(url.rpartition("/")[0])
    return StoredModel(url, run.url, run)


def data_of(model: Model, data: str | None) -> str:
    """URL of the shards: those given, or those the model's run was trained on."""
    if data:
        return store.absolute(data)
    if model.run:
        return model.run.data
    raise ConfigError(f"{model.source} does not say where its data is; give --data.")


def store_schedules(home: str, schedules: Mapping[str, TimeSteps]) -> None:
    """Keep time steps in a model's home, beside those kept before."""
    store.write_json(store.join(home, SCHEDULES), dump_schedules(_stored(home) | dict(schedules)))


def _stored(home: str) -> dict[str, TimeSteps]:
    path = store.join(home, SCHEDULES)
    if not store.exists(path):
        return {}
    try:
        return read_schedules(store.read_bytes(path), path)
    except ValueError as error:
        raise ConfigError(
            f"{error} Remove that file to go back to the published time steps, then run "
            f"`python -m pipelines.tune {shlex.quote(home)}` again."
        ) from error
