"""The exact flow of Gaussian data: a ground truth for every sampler, inverter and loss.

For data N(0, s^2 I) the probability-flow ODE has the solution x_u = x_t sqrt((u^2 + s^2) / (t^2 + s^2)).
"""

from dataclasses import dataclass, field

from torch import Tensor

from bcm.types import like_images


@dataclass
class GaussianFlow:
    """f(x_t, t, u) of N(0, s^2 I), which also notes every call."""

    s: float = 0.5
    calls: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, u: Tensor, label: Tensor | None = None) -> Tensor:
        assert t.shape == u.shape == (x_t.shape[0],)
        self.calls.append((float(t[0]), float(u[0])))
        ratio = (u.double() ** 2 + self.s**2) / (t.double() ** 2 + self.s**2)
        return like_images(ratio.sqrt(), x_t) * x_t
