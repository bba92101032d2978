"""The exponential moving average of the weights (Algorithm 1)."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn  # pyright: ignore[reportUnknownVariableType]

from bcm.types import BCMError


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, rate: float) -> None:
    """theta_EMA <- mu theta_EMA + (1 - mu) theta (Algorithm 1); `rate` is mu_EMA, in [0, 1)."""
    if not 0 <= rate < 1:
        raise BCMError(f"EMA rate {rate} is outside [0, 1).")
    averages: list[Tensor] = list(average.parameters())
    parameters: list[Tensor] = list(model.parameters())
    get_ema_multi_avg_fn(rate)(averages, parameters, 0)
