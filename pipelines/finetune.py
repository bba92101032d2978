"""`python -m pipelines.finetune RECIPE --init MODEL`: from a trained consistency model to a bidirectional one.

This is `pipelines.train` with initial weights, which it stores as the run's checkpoint of step 0.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from safetensors.torch import save

from bcm.finetune import bidirectional
from bcm.networks import NetworkConfig, network_to_dict
from bcm.precond import BCM, SIGMA_DATA
from bcm.types import BCMError
from data import store
from pipelines.cli import AT_TOP_LEVEL, parse, run_command
from pipelines.config import Config
from pipelines.errors import ConfigError
from pipelines.models.source import REGISTERED, open_model
from pipelines.recipes import RECIPES, recipe
from pipelines.train import TrainOptions, carry_out, chosen_recipe
from pipelines.training import run as runs

FINETUNING = {name: make for name, make in RECIPES.items() if make().finetunes}
"""The recipes that start from a trained model."""
TRAINED_ALIKE = ("dropout", "dropout_resolution")
"""Fields of a network in which a recipe may differ from the model it starts from: they shape no weight."""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Fine-tune a trained consistency model (iCT) to a bidirectional one on Ray Train (Section 3.2)."""

    training: Annotated[TrainOptions, AT_TOP_LEVEL]
    """The options of pipelines.train."""
    init: str | None = None
    """The model to start from: URL of a run or a checkpoint, or models:/NAME@ALIAS. Not needed with --resume."""
    init_ema_rate: float | None = None
    """Which average of its weights to start from, if it kept several; by default the first, which serves."""


def open_initial(source: str, config: Config, ema_rate: float | None = None) -> runs.Initial:
    """The averaged weights of the consistency model at `source`, made bidirectional; they must fit the recipe."""
    toolkit = open_model(source, ema_rate=ema_rate)
    if toolkit.denoiser:
        raise ConfigError(
            f"{source} was trained with the objective edm: it is a denoiser and no consistency model. "
            "Give --init a model trained with the objective ct."
        )
    try:
        model, network = bidirectional(toolkit.model, toolkit.network)
    except BCMError as error:
        raise ConfigError(f"--init {source}: {error}") from error
    _check_fit(source, network, config)
    if model.sigma_data != SIGMA_DATA:
        raise ConfigError(f"{source} was trained with sigma_data {model.sigma_data}; only {SIGMA_DATA} can go on.")
    place = source if source.startswith(REGISTERED) else store.absolute(source)
    return runs.Initial(model, place, weights_sha256(toolkit.model))


def weights_sha256(model: BCM) -> str:
    """SHA-256 of the weights as a checkpoint stores them, in `ema.safetensors`."""
    return hashlib.sha256(save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})).hexdigest()


def _check_fit(source: str, network: NetworkConfig, config: Config) -> None:
    found, wanted = network_to_dict(network), network_to_dict(config.network)
    differing = [
        f"{key} is {found.get(key)}, not {wanted.get(key)}"
        for key in {**found, **wanted}
        if found.get(key) != wanted.get(key) and key not in TRAINED_ALIKE
    ]
    if differing:
        raise ConfigError(
            f"{source} does not fit recipe {config.recipe}: {'; '.join(differing)}. "
            "Give --init a model of the same network, or the network options that fit it."
        )


def main(argv: Sequence[str]) -> None:
    """The command line."""
    if (name := chosen_recipe(argv, "finetune", FINETUNING)) is None:
        return
    config = recipe(name)
    if not config.finetunes:
        raise ConfigError(f"recipe {name} trains from scratch: python -m pipelines.train {name}")
    start = FinetuneOptions(training=TrainOptions(config=config))
    options = parse(FinetuneOptions, argv[1:], f"finetune {name}", start)
    if options.init is not None and options.training.resume is not None:
        raise ConfigError("--resume goes on with what the run was started from; leave --init out.")
    initial = (
        None if options.init is None else open_initial(options.init, options.training.config, options.init_ema_rate)
    )
    carry_out(options.training, initial)


if __name__ == "__main__":
    run_command(main)
