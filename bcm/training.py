"""Bidirectional consistency training (Algorithm 1): the state, one step, and the loop."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from bcm import rng
from bcm.ema import EMA
from bcm.losses import BCTLoss
from bcm.precond import BCM
from bcm.schedule import ScheduleConfig, discretization, draw_times
from bcm.types import BCMError, Labels, from_uint8

MAX_SKIPPED_IN_A_ROW = 20
"""Steps with non-finite gradients in a row after which training stops."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; the defaults are the paper's for CIFAR-10 (Appendix C.1)."""

    iterations: int = 400_000
    """K, optimizer steps in all."""
    batch_size: int = 1024
    """Images per step over all workers."""
    learning_rate: float = 1e-4
    """eta, of RAdam with betas (0.9, 0.999)."""
    ema_rate: float = 0.99993
    """mu_EMA, per step."""
    seed: int = 0
    """Seed of the initial weights, the order of the images, their noise and their times."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.iterations < 1 or self.batch_size < 1:
            raise BCMError(f"train: iterations={self.iterations}, batch_size={self.batch_size} must be at least 1.")
        if not 0 < self.learning_rate < math.inf:
            raise BCMError(f"train: learning_rate={self.learning_rate} must be positive and finite.")
        if not 0 <= self.ema_rate < 1:
            raise BCMError(f"train: ema_rate={self.ema_rate} is outside [0, 1).")
        if not 0 <= self.seed < 2**63:
            raise BCMError(f"train: seed={self.seed} is outside [0, 2^63).")


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
    ct: Tensor
    st: Tensor
    grad_norm: Tensor


class TrainState:
    """All that training changes: weights, their average, the optimizer and the iteration k."""

    def __init__(self, model: BCM, config: TrainConfig, *, conditional: bool = False) -> None:
        """Start from the weights of `model` at k = 0; `conditional`: whether it takes labels."""
        self.model = model
        self.conditional = conditional
        self.loss: nn.Module = BCTLoss(model)
        self.ema = EMA(model, config.ema_rate)
        self.optimizer = torch.optim.RAdam(model.parameters(), lr=config.learning_rate, foreach=True)
        self.k = 0
        self.skipped = 0
        self.skipped_in_a_row = 0

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device


def train_step(
    state: TrainState, batch: TrainingBatch, config: TrainConfig, schedule: ScheduleConfig, rank: int = 0
) -> StepMetrics:
    """Algorithm 1, one iteration.

    Image order, noise and times depend on (seed, k, position) alone, so that the global batch is the same for any
    number of workers; dropout masks depend on (seed, k, rank).
    """
    k, positions = state.k, batch.positions.to(state.device)
    x = from_uint8(batch.images.to(state.device, non_blocking=True))
    label: Labels | None = batch.labels.to(state.device) if state.conditional else None

    N = discretization(k, config.iterations, schedule)
    times = draw_times(rng.uniform(config.seed, rng.Stream.TIMES, k, positions, 2), N, schedule)
    z = rng.normal(config.seed, rng.Stream.NOISE, k, positions, tuple(x.shape[1:]))

    ct, st = state.loss(x, z, times, label, dropout_seed(config.seed, k, rank))
    (ct + st).backward()
    grad_norm = _update(state)
    state.k += 1
    return StepMetrics(k, N, ct.detach(), st.detach(), grad_norm)


def fit(
    state: TrainState,
    batches: Iterable[TrainingBatch],
    config: TrainConfig,
    schedule: ScheduleConfig,
    rank: int = 0,
) -> Iterator[StepMetrics]:
    """Train to `config.iterations`, one batch and one yield per iteration; the caller may save between any two."""
    stream = iter(batches)
    while state.k < config.iterations:
        yield train_step(state, next(stream), config, schedule, rank)


def dropout_seed(seed: int, k: int, rank: int) -> int:
    """The seed of all dropout masks of one step on one worker."""
    return int(rng.random_words(seed, rng.Stream.DROPOUT, k, torch.tensor([rank]), 1))


def _update(state: TrainState) -> Tensor:
    """Theta <- theta - eta grad; theta_EMA follows. Non-finite gradients are counted and not applied."""
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if math.isfinite(float(norm)):
        state.optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        state.ema.update(state.model)
        state.skipped_in_a_row = 0
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise BCMError(
                f"training diverged: the gradients of {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {state.k}, "
                "were not finite. Lower train.learning-rate, or look at the data, and start from an earlier checkpoint."
            )
    state.optimizer.zero_grad(set_to_none=True)
    return norm
