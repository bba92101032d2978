"""The training losses (Eq. 6, 9, 10) and the one module that data-parallel training wraps."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportUnknownVariableType]

from bcm.distance import pseudo_huber
from bcm.rng import shared_dropout
from bcm.schedule import T_MIN, TrainingTimes
from bcm.types import Flow, Images, Labels, Times, like_images


@dataclass(frozen=True)
class Losses:
    """Per-image weighted losses, each (B,)."""

    ct: Tensor
    st: Tensor

    @property
    def bct(self) -> Tensor:
        """Their sum (Eq. 10)."""
        return self.ct + self.st


def bct_loss(
    f: Flow,
    f_bar: Flow,
    x: Images,
    z: Images,
    times: TrainingTimes,
    label: Labels | None = None,
) -> Losses:
    """Bidirectional consistency training: Eq. 6 plus Eq. 9 is Eq. 10, the loss of Algorithm 1.

    The student `f` makes both of its passes in one batch. `f_bar` is the same flow with frozen parameters: the target
    carries no gradient, the outer pass of the soft-trajectory term carries gradient to its input only.

    Args:
        f: the student flow, called once on 2B images.
        f_bar: the flow with frozen parameters, called twice on B images.
        x: images (B, C, H, W) in [-1, 1].
        z: standard normal noise like `x`.
        times: t_n, t_{n+1}, t_n' and the weights lambda and lambda', each (B,).
        label: class labels (B,) or None.
    """
    t_n, t_next, t_prime = times.t_n, times.t_next, times.t_prime
    zero = torch.full_like(t_n, T_MIN)
    x_n = x + like_images(t_n, x) * z
    x_next = x + like_images(t_next, x) * z
    both = None if label is None else torch.cat([label, label])
    student = f(torch.cat([x_next, x_n]), torch.cat([t_next, t_n]), torch.cat([zero, t_prime]), both)
    x_0, x_prime = student.chunk(2)
    with torch.no_grad():
        target = f_bar(x_n, t_n, zero, label)
    ct = times.weight_ct * pseudo_huber(x_0, target)
    st = times.weight_st * pseudo_huber(f_bar(x_prime, t_prime, zero, label), target)
    return Losses(ct, st)


def frozen(f: nn.Module) -> Flow:
    """The flow f_theta-bar: `f` with its parameters detached, so gradient reaches its input only."""
    constants = {name: tensor.detach() for name, tensor in [*f.named_parameters(), *f.named_buffers()]}

    def f_bar(x_t: Images, t: Times, u: Times, label: Labels | None = None) -> Images:
        return functional_call(f, constants, (x_t, t, u, label))

    return f_bar


class BCTLoss(nn.Module):
    """Computes the whole loss of Algorithm 1 in one forward, so that DDP sees one forward and one backward."""

    def __init__(self, f: nn.Module) -> None:
        """`f`: a module that is a `Flow`."""
        super().__init__()
        self.f = f

    def forward(
        self, x: Images, z: Images, times: TrainingTimes, label: Labels | None, dropout_seed: int
    ) -> tuple[Tensor, Tensor]:
        """Mean CT and ST losses over the batch, two scalars; all network calls share their dropout masks."""
        with shared_dropout(self.f, dropout_seed, rows=x.shape[0]):
            losses = bct_loss(self.f, frozen(self.f), x, z, times, label)
        return losses.ct.mean(), losses.st.mean()
