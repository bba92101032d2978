"""Scores as rows, stored beside the model they belong to."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bcm import strict
from bcm.timesteps import TimeSteps
from data import store
from pipelines.errors import ConfigError

FILE = "scores.json"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measured number with its conditions."""

    metric: Literal["fd-pixels", "mse", "labels-kept"]
    """Frechet distance of pixels; mean squared error in [0, 1]; share of labels that a classifier sees again."""
    task: Literal["sample", "reconstruct", "real"]
    """What was measured: samples, reconstructions, or the held-out images themselves."""
    nfe: int
    """Network calls for an image; 0 for real images."""
    value: float
    error: float | None
    """Standard error over the images; None where the metric has none that is known."""
    count: int
    """Images measured."""
    seeds: tuple[int, int] | None
    """First and last seed of their noise; None for real images."""
    extractor: str | None
    """What made features of the images; None where pixels are compared one by one."""
    steps: TimeSteps | None
    """Time steps; None for real images."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """All scores of a model at one step."""

    k: int
    """Training iterations behind the weights."""
    ema_rate: float | None
    """Which average of the weights; None for the one that serves."""
    schedules: Mapping[str, TimeSteps]
    """The model's time steps then."""
    rows: tuple[Score, ...]


def write_scores(home: str, scores: Scores) -> None:
    """Store scores in a model's home."""
    store.write_json(store.join(home, FILE), strict.dump(scores))


def read_scores(
    home: str, k: int, schedules: Mapping[str, TimeSteps], ema_rate: float | None = None
) -> tuple[Score, ...]:
    """The scores stored in a model's home.

    Those of another step, of other time steps or of another average of the weights are a `ConfigError`.
    """
    path, again = store.join(home, FILE), f"Run `python -m pipelines.evaluate {shlex.quote(home)}`."
    name = home.rpartition("/")[2]
    if not store.exists(path):
        raise ConfigError(f"{name} has no scores yet. {again}")
    text = store.read_bytes(path)
    scores = strict.read(Scores, text, path, lambda problem: ConfigError(f"{problem}. {again}"), complete=True)
    if scores.k != k:
        raise ConfigError(f"the scores of {name} are those of step {scores.k}, but it is at step {k} now. {again}")
    if scores.ema_rate != ema_rate:
        which = "the average that serves" if scores.ema_rate is None else f"the average of rate {scores.ema_rate}"
        raise ConfigError(f"the scores of {name} are those of {which}; give the same --ema-rate. {again}")
    if dict(scores.schedules) != dict(schedules):
        raise ConfigError(f"the time steps of {name} have changed since it was scored. {again}")
    return scores.rows


def table(rows: Sequence[Score]) -> str:
    """The scores for people: a line for each NFE, the held-out images' own distance first."""
    cells = {(row.metric, row.nfe): row.value for row in rows}
    real = cells.get(("fd-pixels", 0))
    lines = [f"{'NFE':>4}  {'Frechet':>8}  {'/ test':>6}  {'MSE':>7}  {'labels kept':>11}"]
    for nfe in sorted({row.nfe for row in rows}):
        distance, error, kept = (cells.get((metric, nfe)) for metric in ("fd-pixels", "mse", "labels-kept"))
        line = [
            f"{nfe or 'test':>4}",
            " " * 8 if distance is None else f"{distance:8.4f}",
            " " * 6 if distance is None or not real else f"{distance / real:6.2f}",
            " " * 7 if error is None else f"{error:7.5f}",
            " " * 11 if kept is None else f"{kept:11.1%}",
        ]
        lines.append("  ".join(line))
    return "\n".join(lines)
