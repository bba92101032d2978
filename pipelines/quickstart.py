"""`python -m pipelines.quickstart`: from real images to a registered model that generates and inverts, on a laptop."""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import session
from data import store
from data.prepare import prepare
from data.prepare.audit import describe
from pipelines.cli import command_line, parse, run_command, stage, words
from pipelines.config import Config
from pipelines.errors import ConfigError
from pipelines.evaluate import EvaluateOptions, evaluate
from pipelines.evaluation.scores import table as score_table
from pipelines.recipes import recipe
from pipelines.register import RegisterOptions, register
from pipelines.tracking.client import is_local, redacted, resolve_uri
from pipelines.train import TrainOptions, check
from pipelines.training.launch import launch
from pipelines.tune import TuneOptions, tune
from pipelines.tuning.search import table as tune_table


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions:
    """Prepare the digits, train, evaluate, search time steps, register, load back and draw: about eight minutes."""

    seed: int = 0
    """Seed of the training."""
    storage: str = "runs"
    """URL of the folder for data and runs."""
    recipe: str = "digits"
    """The recipe to train."""
    smoke: bool = False
    """Cut the recipe to a few steps: every part is shown in a minute, and nothing is learnt."""
    tune_seconds: float = 8.0
    """Time to search each of three schedules."""
    samples: int = 2000
    """Samples measured at each NFE."""
    dry_run: bool = False
    """Print the stages and stop."""


def quickstart(options: QuickstartOptions, config: Config) -> None:
    """All stages, training with `config`; a second run of it is a new run."""
    began = time.perf_counter()
    root = store.absolute(options.storage)
    data = store.join(root, "data", "digits")
    with stage("1/7 prepare: real 8x8 digits into WebDataset shards"):
        print(describe(prepare("digits", None, data), data))
    training = check(TrainOptions(config=config, storage=root, data=data))
    with session.connect(worker_logs=False):
        with stage(f"2/7 train: {config.train.iterations} steps from scratch on {config.scaling.workers} DDP workers"):
            run = launch(training)
        with stage(f"3/7 tune: search time steps for {options.tune_seconds:.0f} s each"):
            print(tune_table(tune(TuneOptions(model=run.url, seconds=options.tune_seconds))))
        with stage("4/7 evaluate: on the 297 held-out images"):
            scores = evaluate(EvaluateOptions(model=run.url, samples=options.samples))
    with stage("5/7 register: in MLflow, with schedules and scores"):
        registered = register(RegisterOptions(run=run.url))
        assert registered
        print(f"{registered.name} version {registered.version}: {registered.reason}")
    model = f"models:/{registered.name}{'@champion' if registered.is_champion else f'/{registered.version}'}"
    picture = Path(root if store.is_local(root) else "runs") / "quickstart.png"
    with stage(f"6/7 load back: {model} in a fresh process"):
        line = ("pipelines.sample", model, "--task", "all", "--count", "12", "--data", data, "--out", str(picture))
        if code := subprocess.run(words(*line), check=False).returncode:
            raise ConfigError(f"`{command_line(*line)}` failed with exit code {code}.")
    with stage("7/7 result"):
        print(score_table(scores))
        print(f"\nrun       {run.url}")
        print(f"picture   {picture}: samples at NFE 1 to 4; held-out images, their noise, their reconstructions")
        print("\n" + what_next(model, data))
    print(f"\nquickstart passed in {time.perf_counter() - began:.0f} s")


def what_next(model: str, data: str) -> str:
    """Commands that go on from here, each as it can be typed, and where MLflow's pages are."""
    uri = resolve_uri("runs")
    lines = [
        ("pipelines.sample", model, "--nfe", "4", "--count", "25"),
        ("pipelines.sample", model, "--task", "invert", "--data", data),
        ("pipelines.train", "digits", "--help"),
    ]
    if is_local(uri):
        lines.insert(0, ("mlflow", "ui", "--backend-store-uri", uri))
    pages = [] if is_local(uri) else [f"MLflow's pages: {redacted(uri)}"]
    return "\n".join([*pages, "See more:", *(f"  {command_line(*line)}" for line in lines)])


def main(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(QuickstartOptions, argv, "quickstart")
    config = recipe(options.recipe, options.smoke)
    config = replace(config, train=replace(config.train, seed=options.seed))
    if options.dry_run:
        print("prepare, train, tune, evaluate, register, load back, draw; recipe:")
        print(config)
        return
    quickstart(options, config)


if __name__ == "__main__":
    run_command(main)
