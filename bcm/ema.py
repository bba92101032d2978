"""The exponential moving average of the weights (Algorithm 1)."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn  # pyright: ignore[reportUnknownVariableType]

from bcm.types import BCMError


class EMA:
    """theta_EMA (Algorithm 1), a frozen copy of the model that follows its weights."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        """Start at the weights of `model`; `rate` is mu_EMA, in [0, 1)."""
        if not 0 <= rate < 1:
            raise BCMError(f"EMA rate {rate} is outside [0, 1).")
        self.rate = rate
        self._average: Callable[[list[Tensor], list[Tensor], int], None] = get_ema_multi_avg_fn(rate)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """theta_EMA <- mu theta_EMA + (1 - mu) theta."""
        averages: list[Tensor] = list(self.model.parameters())
        parameters: list[Tensor] = list(model.parameters())
        self._average(averages, parameters, 0)
