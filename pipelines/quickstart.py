"""`python -m pipelines.quickstart`: from real images to a registered model that generates and inverts, on a laptop."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import session
from data import store
from data.prepare import prepare
from pipelines.cli import parse, run_command
from pipelines.errors import ConfigError
from pipelines.evaluate import EvaluateOptions, evaluate
from pipelines.evaluate import table as score_table
from pipelines.prepare import describe
from pipelines.recipes import recipe
from pipelines.register import RegisterOptions, register
from pipelines.tracking import client as tracking
from pipelines.train import TrainOptions, plan, start
from pipelines.training import run as runs
from pipelines.tune import TuneOptions, tune_model
from pipelines.tune import table as tune_table


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions:
    """Prepare the digits, train, evaluate, search time steps, register, load back and draw: about eight minutes."""

    seed: int = 0
    """Seed of the training."""
    storage: str = "runs"
    """URL of the folder for data and runs."""
    recipe: str = "digits"
    """The recipe to train; digits-smoke shows every part in a minute and learns nothing."""
    tune_seconds: float = 8.0
    """Time to search each of three schedules."""
    samples: int = 2000
    """Samples measured at each NFE."""
    dry_run: bool = False
    """Print the stages and stop."""


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Announce a stage and say how long it took."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.0f} s", flush=True)


def quickstart(options: QuickstartOptions) -> None:
    """All stages; a second run of it is a new run."""
    began = time.perf_counter()
    root = store.absolute(options.storage)
    data = store.join(root, "data", "digits")
    with stage("1/7 prepare: real 8x8 digits into WebDataset shards"):
        print(describe(prepare("digits", None, data), data))
    config = recipe(options.recipe)
    config = replace(config, train=replace(config.train, seed=options.seed))
    training = plan(TrainOptions(config=config, storage=root, data=data))
    with session.connect(worker_logs=False):
        with stage(f"2/7 train: {config.train.iterations} steps from scratch on {config.scaling.workers} DDP workers"):
            run = start(training)
        with stage(f"3/7 tune: search time steps for {options.tune_seconds:.0f} s each"):
            found = tune_model(TuneOptions(model=run.url, seconds=options.tune_seconds))
            print(tune_table(found))
        with stage("4/7 evaluate: on the 297 held-out images"):
            scores = evaluate(EvaluateOptions(model=run.url, samples=options.samples))
    with stage("5/7 register: in MLflow, with schedules and scores"):
        name, registered = register(RegisterOptions(run=run.url))
        print(f"{name} version {registered.version}: {registered.reason}")
    reference = f"models:/{name}@champion" if registered.is_champion else f"models:/{name}/{registered.version}"
    picture = Path("runs") / "quickstart.png"
    with stage(f"6/7 load back: {reference} in a fresh process"):
        _in_fresh_process("pipelines.picture", reference, "--data", data, "--out", str(picture))
    with stage("7/7 result"):
        print(score_table(scores))
        print(_what_next(run, reference, data, picture))
    print(f"\nquickstart passed in {time.perf_counter() - began:.0f} s")


def _in_fresh_process(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], check=False)
    if done.returncode:
        raise ConfigError(f"`python -m {' '.join(command)}` failed with exit code {done.returncode}.")


def _what_next(run: runs.Run, reference: str, data: str, picture: Path) -> str:
    uri = tracking.redacted(tracking.resolve_uri("runs"))
    return f"""
run       {run.url}
picture   {picture}: samples at NFE 1 to 4; held-out images, their noise, their reconstructions

See more:
  mlflow ui --backend-store-uri {uri}
  python -m pipelines.sample {reference} --nfe 4 --count 16 --out samples.png
  python -m pipelines.sample {reference} --task invert --nfe 4 --data {data} --out inverted.png
  python -m pipelines.train digits --help"""


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(QuickstartOptions, argv, "quickstart")
    if options.dry_run:
        print("prepare, train, tune, evaluate, register, load back, draw; recipe:")
        print(recipe(options.recipe))
        return
    quickstart(options)


if __name__ == "__main__":
    run_command(main)
