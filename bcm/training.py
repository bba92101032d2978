"""Training (Algorithm 1 and its variants): the state, one step, and the loop."""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bcm import rng
from bcm.ema import follow
from bcm.networks import NetworkConfig
from bcm.networks.unet import Block
from bcm.objectives import OBJECTIVES, TrainingLoss
from bcm.precond import BCM
from bcm.schedule import ScheduleConfig, discretization
from bcm.types import BCMError, Images, Labels, from_uint8

MAX_SKIPPED_IN_A_ROW = 20
"""Steps with non-finite losses or gradients in a row after which training stops."""
MAX_SKIPPED_AT_START = 3
"""The same, before any step was made."""
PRECISIONS = ("fp32", "bf16")
"""Known values of `TrainConfig.precision`."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; the defaults are the paper's for CIFAR-10 (Appendix C.1)."""

    iterations: int = 400_000
    """K, optimizer steps in all."""
    batch_size: int = 1024
    """Images per step over all workers."""
    learning_rate: float = 1e-4
    """eta, of RAdam with betas (0.9, 0.999)."""
    ema_rates: tuple[float, ...] = (0.99993,)
    """mu_EMA, per step, of each average that is kept; the first one serves."""
    seed: int = 0
    """Seed of the initial weights, the order of the images, their noise and their times."""
    objective: str = "bct"
    """What is minimised, a name in `bcm.objectives.OBJECTIVES`."""
    precision: str = "fp32"
    """Arithmetic of the network, "fp32" or "bf16" (autocast); losses and times are fp32 or wider with both."""
    channels_last: bool = False
    """Keep images with the channel last in memory, which suits GPUs; refused on CPU."""
    compile: bool = False
    """Compile the network with torch.compile."""
    accumulate: int = 1
    """Micro-batches that a worker makes of its share of a step, one after the other."""
    checkpoint_activations: bool = False
    """Compute the activations again in the backward pass: less memory, more time."""
    clip_norm: float = 0.0
    """Gradients of a larger norm are scaled down to it; 0 for never."""
    foreach: bool = True
    """Let the optimizer update all weights in few large operations (RAdam has no fused form)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.iterations < 1 or self.batch_size < 1:
            raise BCMError(f"train: iterations={self.iterations}, batch_size={self.batch_size} must be at least 1.")
        if not 0 < self.learning_rate < math.inf:
            raise BCMError(f"train: learning_rate={self.learning_rate} must be positive and finite.")
        if not self.ema_rates or not all(0 <= rate < 1 for rate in self.ema_rates):
            raise BCMError(f"train: ema_rates={self.ema_rates} must be one rate or more, each in [0, 1).")
        if len(set(self.ema_rates)) < len(self.ema_rates):
            raise BCMError(f"train: ema_rates={self.ema_rates} names a rate twice.")
        if not 0 <= self.seed < 2**63:
            raise BCMError(f"train: seed={self.seed} is outside [0, 2^63).")
        for name, value, known in (
            ("objective", self.objective, sorted(OBJECTIVES)),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise BCMError(f"train: unknown {name} '{value}'; known are {', '.join(known)}.")
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise BCMError(
                f"train: accumulate={self.accumulate} must divide the batch of {self.batch_size} into micro-batches."
            )
        if not 0 <= self.clip_norm < math.inf:
            raise BCMError(f"train: clip_norm={self.clip_norm} must be positive and finite, or 0 for no clipping.")


class TrainingBatch(Protocol):
    """One worker's share of a global batch."""

    @property
    def positions(self) -> Tensor:
        """(B,) int64: the place of each image in the endless stream of epochs; the key of its noise."""
        ...

    @property
    def images(self) -> Tensor:
        """(B, C, H, W) uint8."""
        ...

    @property
    def labels(self) -> Tensor:
        """(B,) int64."""
        ...


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured on this worker; tensors are scalars, not yet copied from the device."""

    k: int
    N: int
    """Grid points; 0 for an objective without grid."""
    losses: dict[str, Tensor]
    """The mean of each of the objective's terms."""
    grad_norm: Tensor
    """Over all weights, before clipping."""


class TrainState:
    """All that training changes: weights, their averages, the optimizer and the iteration k."""

    averages: dict[float, BCM]
    """theta_EMA by its rate mu_EMA, the serving one first: frozen copies of the model that follow its weights."""

    def __init__(self, model: BCM, config: TrainConfig, *, conditional: bool = False) -> None:
        """Start from the weights of `model`, on its device, at k = 0; `conditional`: whether it takes labels."""
        if network := getattr(model.F_theta, "config", None):
            check_objective(config, network)
        self.model = model
        self.objective = config.objective
        self.conditional = conditional
        _prepare(model, config, self.device)
        self.averages = {rate: copy.deepcopy(model).eval().requires_grad_(False) for rate in config.ema_rates}
        self.loss: nn.Module = TrainingLoss(
            model, OBJECTIVES[config.objective], bf16=config.precision == "bf16", compiled=config.compile
        )
        self.optimizer = torch.optim.RAdam(model.parameters(), lr=config.learning_rate, foreach=config.foreach)
        self.k = 0
        self.skipped = 0
        self.skipped_in_a_row = 0

    @property
    def ema(self) -> BCM:
        """The average that serves."""
        return next(iter(self.averages.values()))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device


def check_objective(train: TrainConfig, network: NetworkConfig) -> None:
    """Raise `BCMError` unless the network reads as many times as the objective gives it."""
    wanted = OBJECTIVES[train.objective].times
    if network.times != wanted:
        raise BCMError(
            f"objective '{train.objective}' trains a network of {wanted} time{'s' * (wanted > 1)}, but network.times "
            f"is {network.times}. Set network.times to {wanted}, or choose another train.objective."
        )


def train_step(
    state: TrainState, batch: TrainingBatch, config: TrainConfig, schedule: ScheduleConfig, rank: int = 0
) -> StepMetrics:
    """Algorithm 1, one iteration.

    Image order, noise and times depend on (seed, k, position) alone, so that the global batch is the same for any
    number of workers; dropout masks depend on (seed, k, rank, micro-batch).
    """
    k = state.k
    N = discretization(k, config.iterations, schedule) if OBJECTIVES[config.objective].grid else 0
    size, rest = divmod(len(batch.positions), config.accumulate)
    if rest:
        raise BCMError(
            f"a worker's {len(batch.positions)} images of a step do not divide into train.accumulate="
            f"{config.accumulate} micro-batches; choose a divisor."
        )
    totals: dict[str, Tensor] = {}
    for index in range(config.accumulate):
        part = slice(index * size, (index + 1) * size)
        place = torch.tensor([rank * config.accumulate + index])
        seed = int(rng.random_words(config.seed, rng.Stream.DROPOUT, k, place, 1))
        sync: AbstractContextManager[None] = nullcontext()
        if isinstance(state.loss, DistributedDataParallel) and index < config.accumulate - 1:
            sync = state.loss.no_sync()  # the workers' gradients are summed in the last micro-batch alone
        with rng.shared_dropout(state.model, seed, rows=size), sync:
            losses = _backward(state, batch, part, config, schedule, N)
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach() / config.accumulate
    grad_norm = _update(state, config)
    state.k += 1
    return StepMetrics(k, N, totals, grad_norm)


def fit(
    state: TrainState,
    batches: Iterable[TrainingBatch],
    config: TrainConfig,
    schedule: ScheduleConfig,
    rank: int = 0,
) -> Iterator[StepMetrics]:
    """Train to `config.iterations`, one batch and one yield per iteration; the caller may save between any two."""
    stream, rehearse = iter(batches), isinstance(state.loss, DistributedDataParallel)
    while state.k < config.iterations:
        if (batch := next(stream, None)) is None:
            raise BCMError(f"the batches ended after {state.k} of {config.iterations} steps; give batches without end.")
        if rehearse:
            _rehearse(state, batch, config, schedule)
            rehearse = False
        yield train_step(state, batch, config, schedule, rank)


def _rehearse(state: TrainState, batch: TrainingBatch, config: TrainConfig, schedule: ScheduleConfig) -> None:
    """A backward pass whose gradients are dropped, so that all steps sum over the workers in one order.

    DistributedDataParallel lays gradients out anew after its first backward pass, and three or more workers add by the
    layout: without this, the first step after a restart would round otherwise.
    """
    rows, N = len(batch.positions) // config.accumulate, discretization(state.k, config.iterations, schedule)
    with rng.shared_dropout(state.model, 0, rows=rows):
        _backward(state, batch, slice(rows), config, schedule, N)
    state.optimizer.zero_grad(set_to_none=True)


def _prepare(model: BCM, config: TrainConfig, device: torch.device) -> None:
    """Turn on the switches of `config` that change the network in place."""
    if config.channels_last:
        if device.type == "cpu":
            raise BCMError(
                "train.channels-last needs a GPU: on a CPU the backward pass of torch's convolutions can crash the "
                "process. Leave it off."
            )
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue, reportUnknownMemberType]
    if config.checkpoint_activations:
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        if not blocks:
            raise BCMError(f"train.checkpoint-activations: {type(model.F_theta).__name__} has no blocks to checkpoint.")
        for block in blocks:
            block.recompute = True


def _inputs(
    state: TrainState, batch: TrainingBatch, part: slice, config: TrainConfig, schedule: ScheduleConfig, N: int
) -> tuple[Images, Images, Any, Labels | None]:
    """A part of the batch as the loss takes it: images, noise, times, labels."""
    parameter, positions = next(state.model.parameters()), batch.positions[part].to(state.device)
    x = from_uint8(batch.images[part].to(state.device, non_blocking=True)).to(parameter.dtype)
    if config.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    label: Labels | None = batch.labels[part].to(state.device) if state.conditional else None
    uniforms = rng.uniform(config.seed, rng.Stream.TIMES, state.k, positions, 2)
    times: Any = OBJECTIVES[config.objective].draw(uniforms, N, schedule)
    z = rng.normal(config.seed, rng.Stream.NOISE, state.k, positions, tuple(x.shape[1:])).to(x.dtype)
    return x, z, times, label


def _backward(
    state: TrainState, batch: TrainingBatch, part: slice, config: TrainConfig, schedule: ScheduleConfig, N: int
) -> dict[str, Tensor]:
    """The losses, after their backward pass; gradients of a loss that is not finite are NaN, which all workers see."""
    losses: dict[str, Tensor] = state.loss(*_inputs(state, batch, part, config, schedule, N))
    loss = torch.stack(list(losses.values())).sum() / config.accumulate
    loss.backward(torch.where(loss.isfinite(), 1.0, math.nan).to(loss))  # pyright: ignore[reportUnknownMemberType]
    return losses


def _update(state: TrainState, config: TrainConfig) -> Tensor:
    """Theta <- theta - eta grad; theta_EMA follows. Non-finite gradients are counted and not applied."""
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if math.isfinite(float(norm)):  # the one place where a step waits for a GPU
        if config.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm)
        state.optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        for rate, average in state.averages.items():
            follow(average, state.model, rate)
        state.skipped_in_a_row = 0
    else:
        _skip(state)
    state.optimizer.zero_grad(set_to_none=True)
    return norm


def _skip(state: TrainState) -> None:
    """Count a step that is not made; too many in a row end training."""
    state.skipped += 1
    state.skipped_in_a_row += 1
    if state.skipped == state.k + 1 == MAX_SKIPPED_AT_START:
        raise BCMError(
            f"training cannot start: the losses or gradients of its first {MAX_SKIPPED_AT_START} steps were not "
            "finite. Look for NaN or infinity in the weights it starts from and for a far too large learning rate."
        )
    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise BCMError(
            f"training diverged: the losses or gradients of {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step "
            f"{state.k}, were not finite. Lower train.learning-rate, or look at the data, and start from an earlier "
            "checkpoint."
        )
