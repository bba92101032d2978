"""`python -m pipelines.report NAME`: figures and pictures about the method."""

from collections.abc import Sequence
from dataclasses import dataclass

from bcm.objectives import OBJECTIVES
from bcm.pairs import PAIR_LAWS
from bcm.schedule import discretization
from pipelines.cli import Recipe, parse_one_of, run_command
from pipelines.errors import ConfigError, nearest
from pipelines.figures.coverage import coverage, maps, table
from pipelines.figures.grid import picture_format, save
from pipelines.recipes import recipe


@dataclass(frozen=True, kw_only=True)
class CoverageOptions:
    """Show how likely each pair of times (t_n, t_n') is in training (Figure 14)."""

    recipe: Recipe
    """The recipe whose time grid is taken."""
    laws: tuple[str, ...] = ()
    """Laws of n' to show side by side; by default the recipe's."""
    N: int | None = None
    """Points of the time grid; by default those of the recipe's last stage."""
    out: str | None = None
    """The picture to write (.png, .jpg, .webp), a path or URL; by default only the figures are printed."""
    dry_run: bool = False
    """Print what would be shown and stop."""

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for law in self.laws:
            if law not in PAIR_LAWS:
                raise ConfigError(f"--laws: unknown law '{law}': {nearest(law, list(PAIR_LAWS))}")
        if self.out is not None:
            picture_format(self.out)
        if self.N is not None and self.N < 3:
            raise ConfigError(f"--N is {self.N}; a pair of times needs at least 3 points of the grid.")


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse_one_of({"coverage": CoverageOptions}, argv, "report")
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
    laws = [coverage(config.schedule, name, N) for name in names]
    print(table(laws))
    if options.out:
        save(maps(laws), options.out)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
