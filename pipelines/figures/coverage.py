"""How likely each pair of times (t_n, t_n') is in training (Figure 14): the law, its figures, its maps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from bcm.pairs import joint
from bcm.schedule import ScheduleConfig, p_n, time_grid

PIXELS = 240
"""Points on each axis of a map at which a law is looked up."""


@dataclass(frozen=True)
class Coverage:
    """The law of (t_n, t_n')."""

    law: str
    """Its name in `PAIR_LAWS`."""
    grid: Tensor
    """t_1 ... t_N, (N,)."""
    chances: Tensor
    """Probability of (t_n, t_n'), row n and column n' from 1 on, (N-1, N); n' = N has none in some laws."""

    def chance(self, t: tuple[float, float], u: tuple[float, float] = (0, np.inf)) -> float:
        """Probability that t_n and t_n' lie within `t` and `u`, both ends left out; summed, not sampled."""
        rows, columns = ((self.grid > low) & (self.grid < high) for low, high in (t, u))
        return float(self.chances[rows[:-1]][:, columns].sum())


def coverage(schedule: ScheduleConfig, law: str, N: int) -> Coverage:
    """The law named `law` on the grid of `N` points with the p(n) of `schedule`."""
    grid = time_grid(N, schedule)
    chances = joint(law, p_n(grid, schedule), grid)
    padding = chances.new_zeros(N - 1, N - chances.shape[1])
    return Coverage(law, grid, torch.cat([chances, padding], dim=1))


def table(laws: Sequence[Coverage]) -> str:
    """A table: how much of training is at small times, at large times, and at pairs like those of inversion."""
    lines = [f"{'law':20s}  P(t_n < 0.085)  P(t_n > 1)  P(0.05 < t_n < 0.1 and t_n' > 60)"]
    for law in laws:
        small, large, jump = law.chance((0, 0.085)), law.chance((1, np.inf)), law.chance((0.05, 0.1), (60, np.inf))
        lines.append(f"{law.law:20s}  {small:14.3f}  {large:10.3f}  {jump:33.2g}")
    return "\n".join(lines)


def maps(laws: Sequence[Coverage]) -> Figure:
    """Maps of the laws, a column for each; above with linear axes, below with logarithmic ones (Figure 14).

    A law is looked up at evenly spaced points of the scaled axes.
    """
    highest = max(float(law.chances.max()) for law in laws)
    shades = LogNorm(highest / 1e4, highest, clip=True)
    figure = Figure(figsize=(1.4 + 3.2 * len(laws), 6), layout="constrained")
    panels = figure.subplots(2, len(laws), squeeze=False)
    scales = ((np.asarray, (0, 20, 40, 60, 80)), (np.log10, (0.01, 0.1, 1, 10)))
    for row, (scale, ticks) in zip(panels, scales, strict=True):
        for law, axes in zip(laws, row, strict=True):
            edges = scale(law.grid.numpy())
            centres = np.linspace(edges[0], edges[-1], 2 * PIXELS + 1)[1::2]
            cells = np.searchsorted(edges, centres, side="right") - 1
            axes.imshow(
                np.ma.masked_equal(law.chances.numpy()[cells][:, cells].T, 0),
                norm=shades,
                origin="lower",
                interpolation="nearest",
                extent=(edges[0], edges[-1], edges[0], edges[-1]),
            )
            axes.set_xticks(scale(ticks), labels=[f"{tick:g}" for tick in ticks])
            axes.set_yticks(scale(ticks), labels=[f"{tick:g}" for tick in ticks])
            axes.set_xlabel("$t_n$")
            axes.set_ylabel("$t_{n'}$")
    for law, axes in zip(laws, panels[0], strict=True):
        axes.set_title(law.law)
    figure.colorbar(panels[0, 0].images[0], ax=panels, label="probability of the pair, at least 1e-4 of the highest")
    return figure
