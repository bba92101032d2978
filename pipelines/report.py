"""`python -m pipelines.report NAME`: figures and pictures about the method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from bcm.objectives import OBJECTIVES
from bcm.pairs import PAIR_LAWS, joint
from bcm.schedule import discretization, p_n, time_grid
from pipelines.cli import Positional, parse, run_command
from pipelines.config import Config
from pipelines.errors import ConfigError, nearest
from pipelines.recipes import recipe

PIXELS = 240
"""Points on each axis of a map at which a law is looked up."""


@dataclass(frozen=True, kw_only=True)
class CoverageOptions:
    """Show how likely each pair of times (t_n, t_n') is in training (Figure 14)."""

    recipe: Positional
    """The recipe whose time grid is taken."""
    laws: tuple[str, ...] = ()
    """Laws of n' to show side by side; by default the recipe's."""
    N: int | None = None
    """Points of the time grid; by default those of the recipe's last stage."""
    out: str | None = None
    """The PNG to write; by default only the figures are printed."""
    dry_run: bool = False
    """Print what would be shown and stop."""

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for law in self.laws:
            if law not in PAIR_LAWS:
                raise ConfigError(f"--laws: unknown law '{law}': {nearest(law, list(PAIR_LAWS))}")
        if self.N is not None and self.N < 3:
            raise ConfigError(f"--N is {self.N}; a pair of times needs at least 3 points of the grid.")


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


def coverage(config: Config, law: str, N: int) -> Coverage:
    """The law named `law` on the grid of `N` points with the p(n) of `config`."""
    grid = time_grid(N, config.schedule)
    chances = joint(PAIR_LAWS[law], p_n(grid, config.schedule), grid)
    padding = chances.new_zeros(N - 1, N - chances.shape[1])
    return Coverage(law, grid, torch.cat([chances, padding], dim=1))


def figures(laws: Sequence[Coverage]) -> str:
    """A table: how much of training is at small times, at large times, and at pairs like those of inversion."""
    lines = [f"{'law':20s}  P(t_n < 0.085)  P(t_n > 1)  P(0.05 < t_n < 0.1 and t_n' > 60)"]
    for law in laws:
        small, large, jump = law.chance((0, 0.085)), law.chance((1, np.inf)), law.chance((0.05, 0.1), (60, np.inf))
        lines.append(f"{law.law:20s}  {small:14.3f}  {large:10.3f}  {jump:33.2g}")
    return "\n".join(lines)


def maps(laws: Sequence[Coverage]) -> Figure:
    """Maps of the laws, a column for each; above with linear axes, below with logarithmic ones (Figure 14)."""
    highest = max(float(law.chances.max()) for law in laws)
    shades = LogNorm(highest / 1e4, highest, clip=True)
    figure = Figure(figsize=(1.4 + 3.2 * len(laws), 6), layout="constrained")
    axes = figure.subplots(2, len(laws), squeeze=False)
    for law, (linear, logarithmic) in zip(laws, axes.T, strict=True):
        linear.set_title(law.law)
        _draw(linear, law, lambda t: t, shades)
        _draw(logarithmic, law, np.log10, shades)
    figure.colorbar(axes[0, 0].images[0], ax=axes, label="probability of the pair, at least 1e-4 of the highest")
    return figure


def _draw(axes: Axes, law: Coverage, scale: Callable[[Any], Any], shades: LogNorm) -> None:
    """Look the law up at evenly spaced points of the scaled axes."""
    edges = scale(law.grid.numpy())
    centres = np.linspace(edges[0], edges[-1], 2 * PIXELS + 1)[1::2]
    cells = np.searchsorted(edges, centres, side="right") - 1
    shown = law.chances.numpy()[cells][:, cells].T
    low, high = edges[0], edges[-1]
    axes.imshow(
        np.ma.masked_equal(shown, 0),
        norm=shades,
        origin="lower",
        interpolation="nearest",
        extent=(low, high, low, high),
    )
    ticks = (0.01, 0.1, 1, 10) if scale is np.log10 else (0, 20, 40, 60, 80)
    axes.set_xticks([scale(tick) for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    axes.set_yticks([scale(tick) for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    axes.set_xlabel("$t_n$")
    axes.set_ylabel("$t_{n'}$")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, making its folder; a place that cannot be written is a `ConfigError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=100)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}. Choose another --out.") from error


def report_coverage(argv: Sequence[str]) -> None:
    """Show how likely each pair of times (t_n, t_n') is in training (Figure 14)."""
    options = parse(CoverageOptions, argv, "report coverage")
    config = recipe(options.recipe)
    if OBJECTIVES[config.train.objective].times == 1:
        raise ConfigError(f"recipe {config.recipe} draws no pairs of times; take one of a bidirectional model.")
    K = config.train.iterations
    N = options.N or discretization(K - 1, K, config.schedule)
    names = options.laws or (config.schedule.pairs,)
    print(f"{config.recipe}, N = {N}")
    if options.dry_run:
        print(f"would show {', '.join(names)}" + (f" -> {options.out}" if options.out else ""))
        return
    laws = [coverage(config, name, N) for name in names]
    print(figures(laws))
    if options.out:
        save(maps(laws), Path(options.out))
        print(f"wrote {options.out}")


REPORTS: dict[str, Callable[[Sequence[str]], None]] = {"coverage": report_coverage}


def main(argv: Sequence[str]) -> None:
    """The command line."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m pipelines.report NAME [options]; NAME --help lists the options.\n\nReports:")
        print("\n".join(f"  {name:10s} {(report.__doc__ or '').splitlines()[0]}" for name, report in REPORTS.items()))
        return
    if argv[0] not in REPORTS:
        raise ConfigError(f"unknown report '{argv[0]}': {nearest(argv[0], list(REPORTS))}")
    REPORTS[argv[0]](argv[1:])


if __name__ == "__main__":
    run_command(main)
