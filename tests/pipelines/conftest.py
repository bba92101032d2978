"""A small world for the commands: digits shards, a run with checkpoints, an MLflow store; no test sees another's."""

import importlib
import shutil
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from servers import free_port
from world import NAME, STEP, Command, Main, Outcome, World

from bcm import strict
from bcm.networks import build_network
from bcm.precond import BCM
from bcm.timesteps import PUBLISHED
from bcm.training import TrainState
from cluster import session
from data.cache import CACHE_VARIABLE
from data.order import shuffle_of
from data.prepare import prepare
from pipelines.cli import run_command
from pipelines.config import flatten
from pipelines.models import run as runs
from pipelines.recipes import recipe
from pipelines.tracking import client as tracking


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or written to the caches and stores of whoever runs the tests."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(tracking.URI_VARIABLE, f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Digits shards, and a run of random weights as training leaves it; made once, copied for each test."""
    root = tmp_path_factory.mktemp("original")
    world = World.at(root)
    manifest = prepare("digits", None, str(world.data))
    config = recipe("digits", smoke=True)
    config = replace(config, window=shuffle_of(manifest, "train").window)
    run_id = tracking.start_run(world.mlflow, experiment="bcm", name=NAME, params=flatten(strict.dump(config)), tags={})
    # The file alone is copied, so what still stands in the log beside it must be in it.
    with closing(sqlite3.connect(world.mlflow.removeprefix("sqlite:///"))) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    run = runs.Run(
        name=NAME,
        storage=str(world.runs),
        data=str(world.data),
        manifest_sha256=manifest.sha256,
        mlflow_run=run_id,
        code="unknown",
        config=config,
        schedules=PUBLISHED[config.time_steps],
    )
    runs.write_run(run)
    torch.manual_seed(0)
    state = TrainState(BCM(build_network(config.network)), config.train)
    state.k = STEP
    runs.save_run_checkpoint(world.checkpoint, state, run)
    return world


@pytest.fixture
def world(original: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A copy of the original; the working directory is its root and MLflow its store."""
    mine = World.at(tmp_path)
    shutil.copytree(original.data, mine.data)
    shutil.copytree(original.runs, mine.runs)
    shutil.copy(original.mlflow.removeprefix("sqlite:///"), tmp_path)
    run = runs.read_run(str(mine.run))
    runs.write_run(replace(run, data=str(mine.data)))
    monkeypatch.chdir(tmp_path)
    return mine


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs `python -m pipelines.MODULE ARGUMENTS`, or a main function, inside this process, through `run_command`."""
    before = signal.getsignal(signal.SIGTERM)

    def run(what: str | Main, *arguments: str) -> Outcome:
        main: Main = importlib.import_module(f"pipelines.{what}").main if isinstance(what, str) else what
        monkeypatch.setattr(sys, "argv", [str(what), *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_command(main)
        shown = capsys.readouterr()
        return Outcome(int(left.value.code or 0), shown.out, shown.err)

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """One private Ray for all tests of a file that ask for it."""
    with session.connect(cpus=2, worker_logs=False):
        yield


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an MLflow server that is down."""
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv(tracking.URI_VARIABLE, uri)
    return uri
