"""The preconditioning of the network (Eq. 5): F_theta becomes f(x_t, t, u)."""

import torch
from torch import Tensor, nn

from bcm.types import Images, Labels, Times, like_images

SIGMA_DATA = 0.5
"""Standard deviation of the data in [-1, 1] that Eq. 5 assumes (Appendix C.1)."""


def scalings(t: Times, u: Times, sigma_data: float = SIGMA_DATA) -> tuple[Tensor, Tensor, Tensor]:
    """c_in, c_skip and c_out of Eq. 5, each (B,) in the dtype of `t`.

    u = t gives (., 1, 0), the identity; u = 0 gives EDM's scalings.
    """
    variance = sigma_data**2 + t**2
    c_in = variance.rsqrt()
    c_skip = (sigma_data**2 + t * u) / variance
    c_out = sigma_data * (t - u) / variance.sqrt()
    return c_in, c_skip, c_out


class BCM(nn.Module):
    """f(x_t, t, u) = c_skip x_t + c_out F_theta(c_in x_t, t, u): a `Flow` with parameters (Section 3.1)."""

    def __init__(self, F_theta: nn.Module, sigma_data: float = SIGMA_DATA) -> None:
        """Wrap the network `F_theta`(x, t, u, label); `sigma_data` is that of Eq. 5."""
        super().__init__()
        self.F_theta = F_theta
        self.sigma_data = sigma_data

    def forward(self, x_t: Images, t: Times, u: Times, label: Labels | None = None) -> Images:
        """Carry `x_t` (B, C, H, W) from times `t` (B,) to times `u` (B,)."""
        t, u = t.to(torch.float64), u.to(torch.float64)
        c_in, c_skip, c_out = (like_images(c, x_t) for c in scalings(t, u, self.sigma_data))
        F_x: Tensor = self.F_theta(c_in * x_t, t, u, label)
        return c_skip * x_t + c_out * F_x.to(x_t.dtype)
