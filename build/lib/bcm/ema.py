"""The exponential moving average of the weights (Algorithm 1)."""

import copy

import torch
from torch import nn

from bcm.types import BCMError


class EMA:
    """theta_EMA, a frozen copy of the model that follows its weights."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        """Start at the weights of `model`; `rate` is mu_EMA, in [0, 1)."""
        if not 0 <= rate < 1:
            raise BCMError(f"EMA rate {rate} is outside [0, 1).")
        self.rate = rate
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """theta_EMA <- mu theta_EMA + (1 - mu) theta."""
        averages, parameters = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(averages, parameters, 1 - self.rate)
