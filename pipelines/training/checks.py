"""What is looked at before a training begins: every foreseeable obstacle, leaving no trace."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from safetensors.torch import save

from bcm import strict
from bcm.checkpoint import load_checkpoint
from bcm.finetune import bidirectional
from bcm.networks import build_network
from bcm.precond import BCM, SIGMA_DATA
from bcm.training import TrainState
from bcm.types import BCMError
from cluster import session
from data import store
from data.cache import ShardCache
from data.manifest import Manifest
from data.order import Shuffle, shuffle_of, windows_from
from pipelines.config import Config, flatten
from pipelines.errors import ConfigError
from pipelines.evaluation.reference import manifest_for
from pipelines.models.checkpoints import checkpoints, committed, is_whole, local_copy
from pipelines.models.run import Run, read_run
from pipelines.models.source import model_at
from pipelines.tracking import client

TRAINED_ALIKE = ("dropout", "dropout_resolution")
"""Fields of a network in which a recipe may differ from the model it starts from: they shape no weight."""


@dataclass(frozen=True)
class Initial:
    """A trained model to start from."""

    model: BCM
    """Its weights in the network that is to be trained."""
    source: str
    """Where it came from, as the user named it."""
    sha256: str
    """SHA-256 of its weights as they were there."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training that nothing is known to stand in the way of."""

    config: Config
    """With the number of shards of its window, where it is a new run."""
    storage: str
    data: str
    manifest: Manifest
    tracking_uri: str
    experiment: str
    resumed: Run | None
    """The run to go on with; None for a new one."""
    fallback: str | None
    """URL of the checkpoint to go on from where Ray's record of them is lost."""
    initial: Initial | None
    """The trained model that a new run starts from; None for random weights."""


def checked(
    config: Config,
    *,
    storage: str,
    data: str,
    resume: str | None = None,
    experiment: str = "bcm",
    initial: Initial | None = None,
) -> Training:
    """Check data, storage, MLflow and the run to resume; needs no Ray.

    Args:
        config: what to train.
        storage: URL of the folder for runs.
        data: URL of the shards.
        resume: name of a run in `storage` to go on with.
        experiment: MLflow's, of a new run.
        initial: the model that a new run starts from.
    """
    if config.finetunes and initial is None and resume is None:
        raise ConfigError(f"recipe {config.recipe} starts from a trained network of one time: give it by --init MODEL.")
    manifest = _manifest(config, data)
    shuffle = shuffle_of(manifest, "train", config.window)
    config = replace(config, window=shuffle.window)
    if not session.is_given():
        _read_first_window(data, manifest, shuffle, config.train.seed)
    resumed, fallback = None, None
    if resume is not None:
        resumed, fallback = _resumed(resume, config, storage, data, manifest)
    store.check_writable(storage)
    uri = client.resolve_uri("runs")
    client.connect(uri)
    return Training(
        config=config,
        storage=storage,
        data=data,
        manifest=manifest,
        tracking_uri=uri,
        experiment=experiment,
        resumed=resumed,
        fallback=fallback,
        initial=initial,
    )


def _manifest(config: Config, data: str) -> Manifest:
    manifest = manifest_for(config.network, data)
    if config.dataset != manifest.name:
        raise ConfigError(
            f"recipe {config.recipe} trains on {config.dataset}, but {data} holds {manifest.name}. Give --data."
        )
    return manifest


def _read_first_window(data: str, manifest: Manifest, shuffle: Shuffle, seed: int) -> None:
    """Training on this machine begins with these shards; of a set below 64 MiB of pixels they are all."""
    cache = ShardCache(data, manifest, "train")
    for shard in next(windows_from(seed, 0, shuffle)).tolist():
        cache.content(shard)


def _resumed(name: str, config: Config, storage: str, data: str, manifest: Manifest) -> tuple[Run, str | None]:
    """The record of the run to resume, and its newest checkpoint, which has been read to its last byte.

    Ray's own record of the checkpoints decides which are whole. Where a kill has lost it, the newest that can be read
    is taken, for the one being stored at that moment may be half there.
    """
    run = replace(read_run(store.join(storage, name)), storage=storage, data=data)
    check_same(run, config, manifest.sha256)
    names = checkpoints(run.url)
    if committed(run.url) is None:
        whole = [name for name in names if is_whole(store.join(run.url, name))]
        if whole and whole != names:
            print(f"warning: passing over checkpoints that are not whole: {', '.join(sorted({*names} - {*whole}))}")
        names = whole or names
    if not names:
        return run, None
    url = store.join(run.url, names[-1])
    with local_copy(url, lambda index: index.files) as folder:
        load_checkpoint(folder, idle_state(BCM(build_network(config.network)), config), config.network)
    return run, url


def check_same(run: Run, config: Config, manifest_sha256: str) -> None:
    """Refuse to resume `run` with another config or data set; only `scaling` may change."""
    before, now = flatten(strict.dump(run.config)), flatten(strict.dump(config))
    changed = [key for key in now if not key.startswith("scaling.") and before.get(key) != now[key]]
    if changed:
        shown = "; ".join(f"{key} was {before.get(key)}, now {now[key]}" for key in changed)
        raise ConfigError(
            f"run {run.name} cannot be resumed with other options: {shown}. Give the same, or start anew."
        )
    if run.manifest_sha256 != manifest_sha256:
        raise ConfigError(
            f"run {run.name} was trained on another data set than {run.data} holds now, or before manifests had "
            "version 2, by which a set has another hash. Start a new run."
        )


def idle_state(model: BCM, config: Config) -> TrainState:
    """A state to save or to load on this machine's CPU; without the switches of training, which may need a GPU."""
    return TrainState(model, replace(config.train, channels_last=False), conditional=config.network.classes > 0)


def open_initial(source: str, config: Config, ema_rate: float | None = None) -> Initial:
    """The averaged weights of the consistency model at `source`, made bidirectional; they must fit the recipe."""
    if not config.finetunes:
        raise ConfigError(f"recipe {config.recipe} trains from scratch; leave --init out.")
    origin = model_at(source)
    toolkit = origin.open(ema_rate=ema_rate)
    if toolkit.denoiser:
        raise ConfigError(
            f"{source} was trained with the objective edm: it is a denoiser and no consistency model. "
            "Give --init a model trained with the objective ct."
        )
    try:
        model, network = bidirectional(toolkit.model, toolkit.network)
    except BCMError as error:
        raise ConfigError(f"--init {source}: {error}") from error
    held: Mapping[str, Any] = strict.dump(network)
    wanted: Mapping[str, Any] = strict.dump(config.network)
    differing = [
        f"{key} is {held.get(key)}, not {wanted.get(key)}"
        for key in {**held, **wanted}
        if held.get(key) != wanted.get(key) and key not in TRAINED_ALIKE
    ]
    if differing:
        raise ConfigError(
            f"{source} does not fit recipe {config.recipe}: {'; '.join(differing)}. "
            "Give --init a model of the same network, or the network options that fit it."
        )
    if model.sigma_data != SIGMA_DATA:
        raise ConfigError(f"{source} was trained with sigma_data {model.sigma_data}; only {SIGMA_DATA} can go on.")
    weights = {name: tensor.contiguous() for name, tensor in toolkit.model.state_dict().items()}
    return Initial(model, origin.source, hashlib.sha256(save(weights)).hexdigest())
