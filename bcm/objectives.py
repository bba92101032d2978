"""Training objectives by name, and the one module that data-parallel training wraps."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from bcm import losses
from bcm.losses import Terms
from bcm.precond import SIGMA_DATA
from bcm.rng import Dropout
from bcm.schedule import NoiseLevels, ScheduleConfig, draw_noise_levels, draw_times
from bcm.types import BCMError, Flow, Images, Labels

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Objective(Generic[T]):
    """What training minimises: the sum of `loss`'s terms at times drawn by `draw`."""

    times: int
    """How many times the network reads: 1 (t) or 2 (t and u)."""
    draw: Callable[[Tensor, int, ScheduleConfig], T]
    """(uniforms (B, 2) float64 in [0, 1), N, schedule) -> times and weights of a batch."""
    loss: Callable[[Flow, Flow, Images, Images, T, Labels | None], Terms]
    """A function of `bcm.losses`: (f, f_bar, x, z, times, label) -> weighted losses of each image, (B,), by term."""
    grid: bool = True
    """Whether the times lie on the grid of N points."""


def _noise_levels(uniforms: Tensor, N: int, config: ScheduleConfig) -> NoiseLevels:
    return draw_noise_levels(uniforms, SIGMA_DATA)


OBJECTIVES: dict[str, Objective[Any]] = {
    "ct": Objective(times=1, draw=draw_times, loss=losses.ct_loss),
    "bct": Objective(times=2, draw=draw_times, loss=losses.bct_loss),
    "bct-eq8": Objective(times=2, draw=draw_times, loss=losses.bct_eq8_loss),
    "st-only": Objective(times=2, draw=draw_times, loss=losses.st_loss),
    "bct-official": Objective(times=2, draw=partial(draw_times, start_next=True), loss=losses.bct_official_loss),
    "edm": Objective(times=1, draw=_noise_levels, loss=losses.edm_loss, grid=False),
}
"""`ct`: iCT (Eq. 6). `bct`: the paper's (Eq. 10). `bct-eq8`, `st-only`: its ablations (Appendix B.2). `bct-official`:
the official code's variant. `edm`: the diffusion baseline (Figure 5)."""


def frozen(f: nn.Module) -> nn.Module:
    """The flow f_theta-bar: `f` again, without gradient to its parameters.

    It shares the memory of the weights and the dropout layers with `f`, so it follows every update in place and draws
    the same masks. Move `f` to its device before.
    """
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in f.parameters()}
    shared |= {id(buffer): buffer for buffer in f.buffers()}
    shared |= {id(layer): layer for layer in f.modules() if isinstance(layer, Dropout)}
    return copy.deepcopy(f, shared)


class TrainingLoss(nn.Module):
    """Computes the whole loss of Algorithm 1 in one forward, so that DDP sees one forward and one backward."""

    def __init__(self, f: nn.Module, objective: Objective[Any], *, bf16: bool = False, compiled: bool = False) -> None:
        """Take the student.

        Args:
            f: a module that is a `Flow`, on its device.
            objective: what to minimise.
            bf16: run the network under autocast; what surrounds it keeps its precision.
            compiled: compile `f` at the first forward.
        """
        super().__init__()
        self.f = f
        self.objective = objective
        self.bf16 = bf16
        self._to_compile = compiled
        # In a tuple, so that it is no submodule: DDP and state_dict must see each weight once.
        self._teacher = (frozen(f),)

    def forward(self, x: Images, z: Images, times: object, label: Labels | None) -> Terms:
        """The mean of each term over the batch, scalars; call it and its backward inside one `shared_dropout`."""
        teacher = self._teacher[0]
        if not all(p.is_set_to(q) for p, q in zip(self.f.parameters(), teacher.parameters(), strict=True)):
            raise BCMError("the model was moved after its training state was made; move it first.")
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            if self._to_compile:
                self._compile(x, label)
            terms = self.objective.loss(self.f, teacher, x, z, times, label)
        return {name: term.mean() for name, term in terms.items()}

    def _compile(self, x: Images, label: Labels | None) -> None:
        ones = torch.ones(len(x), dtype=torch.float64, device=x.device)
        with torch.no_grad():  # the dropout layers learn the form of their masks, which compiled code cannot draw
            self.f(x, ones, ones, label)
        for module in (self.f, self._teacher[0]):
            module.compile(dynamic=False)  # pyright: ignore[reportUnknownMemberType]
        self._to_compile = False
