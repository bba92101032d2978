"""Compares the laws of n' (`bcm.pairs.PAIR_LAWS`) on the digits: equal network, images seen and seeds; one process.

python -m benchmarks.pair_laws --seeds 0 1 2 3 4 --out pair_laws.jsonl

Each trained model adds its scores to the file as one line, and what the file has already is not trained again: an
interrupted run goes on where it stopped, and laws or seeds may be run one after another. Then it prints a table in
Markdown of all lines with this number of steps: mean and standard deviation over the seeds and, against the first
law, whether a score is better or worse in a paired 95 % t-test over the seeds that both have, or else the same. About
seven minutes a model on one core.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bcm.inference import Toolkit, generate, invert, reconstruct
from bcm.metrics import Moments, frechet_distance, mse
from bcm.networks import build_network
from bcm.pairs import PAIR_LAWS
from bcm.precond import BCM
from bcm.schedule import T_MAX, T_MIN
from bcm.timesteps import PAPER_CIFAR10, Ancestral, Combined, TimeSteps, Zigzag
from bcm.training import TrainState, fit
from bcm.types import Images, from_uint8
from benchmarks.batches import batches
from benchmarks.on_digits import uint8_images
from pipelines.config import Config
from pipelines.evaluation.features import pixels
from pipelines.recipes import recipe
from pipelines.tuning.trials import TRIAL_SEEDS, Trials, score

SAMPLES = 2000
"""Samples of each Frechet distance."""
TUNING_SAMPLES = 1000
"""Samples of each point of the grid search for time steps."""
SAMPLING, INVERTING = (1, 2, 3, 4), (1, 2, 4)
"""NFE of the paper's time steps for CIFAR-10."""

GRID: dict[str, list[TimeSteps]] = {
    "sample-2": [Ancestral(times=(T_MIN, t, T_MAX)) for t in (0.4, 0.8, 1.2, 2.0, 4.0, 10.0)],
    "sample-3": [
        Zigzag(times=(t, T_MAX), noise_scales=(epsilon,))
        for t, epsilon in itertools.product((0.4, 0.8, 2.0), (0.1, 0.2, 0.35))
    ],
    "sample-4": [
        Combined(times=(t, T_MAX), zigzag_times=(tau,), noise_scales=(0.1,))
        for t, tau in itertools.product((0.7, 1.2, 2.5), (0.2, 0.3, 0.5))
    ],
}
"""The time steps tried for each model, the paper's among them."""


@dataclass(frozen=True)
class Real:
    """The images a model is measured against."""

    train: Images
    test: Images
    moments: Moments
    """Pixel moments of the training images."""
    unit: float
    """Frechet distance of the test images to the training images."""
    labels: Callable[[Images], np.ndarray]
    """A classifier on pixels."""


def real_images() -> Real:
    from sklearn.svm import SVC

    images, labels = uint8_images("train")
    train, test = from_uint8(images), from_uint8(uint8_images("test")[0])
    machine = SVC(C=10).fit(pixels(train).numpy(), labels)
    moments = Moments.of(pixels(train))
    unit = frechet_distance(Moments.of(pixels(test)), moments)
    return Real(train, test, moments, unit, lambda x: machine.predict(pixels(x).numpy()))


def trained(config: Config) -> Toolkit:
    torch.manual_seed(config.train.seed)
    state = TrainState(BCM(build_network(config.network)), config.train)
    for _ in fit(state, batches(uint8_images("train")[0], config.train), config.train, config.schedule):
        pass
    return Toolkit(model=state.ema, network=config.network, k=state.k, schedules=PAPER_CIFAR10)


def noise_scores(noise: Images) -> dict[str, float]:
    """Standard deviation over T, excess kurtosis and neighbour correlation of all values as one sample."""
    z = noise.double() / T_MAX
    z = z - z.mean()
    variance = z.square().mean()
    pairs = torch.cat([(z[..., 1:] * z[..., :-1]).flatten(), (z[..., 1:, :] * z[..., :-1, :]).flatten()])
    return {
        "std": math.sqrt(variance),
        "kurtosis": float(z.pow(4).mean() / variance**2 - 3),
        "correlation": float(pairs.mean() / variance),
    }


def tuned(toolkit: Toolkit, real: Real) -> dict[str, TimeSteps]:
    """The best time steps of `GRID` for this model, by the Frechet distance of samples of other seeds."""
    trials = Trials(toolkit=toolkit, train=real.moments, x=real.train[:0], labels=(), samples=TUNING_SAMPLES)
    found = {name: min(points, key=lambda steps: score(trials, steps, TRIAL_SEEDS)) for name, points in GRID.items()}
    return {"sample-1": PAPER_CIFAR10["sample-1"], **found}


def scores(toolkit: Toolkit, real: Real) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind, chosen in (("", toolkit), ("tuned ", replace(toolkit, schedules=tuned(toolkit, real)))):
        for nfe in SAMPLING[bool(kind) :]:
            samples = Moments.of(pixels(generate(chosen, range(SAMPLES), nfe)))
            found[f"Frechet/test, {kind}NFE {nfe}"] = frechet_distance(samples, real.moments) / real.unit
    x, seeds = real.test, range(len(real.test))
    for nfe in INVERTING:
        again = reconstruct(toolkit, x, seeds, nfe)
        found[f"MSE, NFE {nfe}"] = float(mse(again, x).mean())
        found[f"labels kept, NFE {nfe}"] = float(np.mean(real.labels(again) == real.labels(x)))
        noise = noise_scores(invert(toolkit, x, seeds, nfe))
        found |= {f"noise {name}, NFE {nfe}": value for name, value in noise.items()}
    return found


def fault(name: str, value: float) -> float:
    """What is bad about a score: the lower the better; ratios count where the score is a distance."""
    if name.startswith(("Frechet", "MSE")):
        return math.log(value)
    if name.startswith("labels"):
        return -value
    return abs(value - ("std" in name))


def verdict(name: str, ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Paired t-test over the seeds of both, on `fault`."""
    from scipy.stats import ttest_rel

    seeds = sorted(ours.keys() & theirs.keys())
    a, b = ([fault(name, law[seed]) for seed in seeds] for law in (ours, theirs))
    if len(seeds) < 2:
        return "too few seeds"
    if a == b or ttest_rel(a, b).pvalue > 0.05:
        return "same"
    return "better" if np.mean(a) < np.mean(b) else "worse"


def table(rows: Sequence[dict[str, Any]], laws: Sequence[str]) -> str:
    """All scores in Markdown, a column for each law and a verdict for each but the first."""
    heads = [laws[0], *(head for law in laws[1:] for head in (law, f"{law}: verdict"))]
    lines = [f"| score | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in rows[0]["scores"]:
        by_law = {law: {row["seed"]: row["scores"][name] for row in rows if row["law"] == law} for law in laws}
        cells: list[str] = []
        for law, values in by_law.items():
            spread = np.std(list(values.values()), ddof=1) if len(values) > 1 else math.nan
            cells.append(f"{np.mean(list(values.values())):.3g} ± {spread:.2g}")
            if law != laws[0]:
                ratio = np.mean(list(values.values())) / np.mean(list(by_law[laws[0]].values()))
                shown = f", {ratio:.2f} x" if name.startswith(("Frechet", "MSE")) else ""
                cells.append(verdict(name, values, by_law[laws[0]]) + shown)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(law: str, seed: int, steps: int, real: Real) -> dict[str, Any]:
    config = recipe("digits")
    config = replace(
        config,
        schedule=replace(config.schedule, pairs=law),
        train=replace(config.train, seed=seed, iterations=steps),
    )
    return {"law": law, "seed": seed, "steps": steps, "scores": scores(trained(config), real)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pair_laws")
    parser.add_argument("--laws", nargs="+", choices=PAIR_LAWS, default=list(PAIR_LAWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=recipe("digits").train.iterations)
    parser.add_argument("--out", type=Path, default=Path("pair_laws.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    real = real_images()
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    there = {(row["law"], row["seed"], row["steps"]) for row in rows}
    for seed, law in itertools.product(options.seeds, options.laws):
        if (law, seed, options.steps) not in there:
            rows.append(run(law, seed, options.steps, real))
            with options.out.open("a") as file:
                print(json.dumps(rows[-1]), file=file)
    wanted = [row for row in rows if row["steps"] == options.steps]
    laws = [law for law in PAIR_LAWS if any(row["law"] == law for row in wanted)]
    print(table(wanted, laws))


if __name__ == "__main__":
    main()
