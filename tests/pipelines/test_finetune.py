"""From a consistency model to a bidirectional one: the whole path on digits, and what cannot be a start."""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from spoil import flip_a_byte
from world import Command, Outcome

from bcm.checkpoint import save_checkpoint
from bcm.inference import SCHEDULES, generate
from bcm.networks import build_network
from bcm.precond import BCM
from bcm.training import TrainState
from cluster import session
from data.cache import CACHE_VARIABLE
from data.prepare import prepare
from pipelines.models import checkpoints
from pipelines.models import run as runs
from pipelines.models.source import model_at
from pipelines.recipes import recipe
from pipelines.tracking import client as tracking
from pipelines.train import TrainOptions, check
from pipelines.training.checks import open_initial
from pipelines.training.launch import launch

ICT, FINETUNE = "digits-ict", "digits-finetune"


@dataclass(frozen=True)
class Place:
    """Data, runs and MLflow of this file's trainings."""

    root: Path

    @property
    def mlflow(self) -> str:
        return f"sqlite:///{self.root}/mlflow.db"

    def options(self, name: str, resume: str | None = None, init: str | None = None) -> TrainOptions:
        return TrainOptions(
            config=recipe(name, smoke=True),
            storage=str(self.root / "runs"),
            data=str(self.root / "data"),
            resume=resume,
            init=init,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A Ray of its own, with digits."""
    found = Place(tmp_path_factory.mktemp("finetune"))
    prepare("digits", None, str(found.root / "data"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(found.root / "cache"))
        patch.setenv(tracking.URI_VARIABLE, found.mlflow)
        with session.connect(cpus=2, worker_logs=False):
            yield found


@pytest.fixture(autouse=True)
def own_places(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One store for all trainings of this file."""
    monkeypatch.setenv(CACHE_VARIABLE, str(place.root / "cache"))
    monkeypatch.setenv(tracking.URI_VARIABLE, place.mlflow)


@pytest.fixture(scope="module")
def ict(place: Place) -> runs.Run:
    """A short training of the consistency model."""
    return launch(check(place.options(ICT)))


@pytest.fixture(scope="module")
def tuned(place: Place, ict: runs.Run) -> runs.Run:
    """A short fine-tuning from it."""
    return launch(check(place.options(FINETUNE, init=ict.url)))


def first(run: runs.Run) -> str:
    """URL of the checkpoint that it started from."""
    return f"{run.url}/{checkpoints.checkpoint_name(0)}"


def weights(run: runs.Run, k: int) -> dict[str, torch.Tensor]:
    folder = Path(run.url) / checkpoints.checkpoint_name(k)
    files = ("model", "ema", "optimizer")
    return {f"{file}:{name}": t for file in files for name, t in load_file(folder / f"{file}.safetensors").items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the path from iCT to BCM


@pytest.mark.slow
def test_fine_tuning_starts_where_the_consistency_model_ended(ict: runs.Run, tuned: runs.Run):
    before, after = model_at(ict.url).open(), model_at(f"{tuned.url}/{checkpoints.checkpoint_name(0)}").open()
    seeds = range(16)
    torch.testing.assert_close(generate(after, seeds, 1), generate(before, seeds, 1), rtol=1e-6, atol=1e-6)
    assert (before.network.times, after.network.times, after.k) == (1, 2, 0)


@pytest.mark.slow
def test_fine_tuning_trains_to_its_end_and_makes_a_bidirectional_model(tuned: runs.Run):
    K = recipe(FINETUNE, smoke=True).train.iterations
    assert checkpoints.latest_checkpoint(tuned.url).endswith(checkpoints.checkpoint_name(K))
    model = model_at(tuned.url).open()
    assert not torch.equal(generate(model, [0], 1), generate(model_at(f"{first(tuned)}").open(), [0], 1))
    assert {"sample-4", "invert-4"} <= model.schedules.keys()


@pytest.mark.slow
def test_a_run_and_mlflow_say_what_it_was_started_from(place: Place, ict: runs.Run, tuned: runs.Run):
    content = (Path(checkpoints.latest_checkpoint(ict.url)) / "ema.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert (tuned.init, tuned.init_sha256) == (ict.url, digest)
    read = runs.read_run(tuned.url)
    assert (read.init, read.init_sha256) == (ict.url, digest)
    params = MlflowClient(place.mlflow).get_run(tuned.mlflow_run).data.params
    assert (params["init"], params["init_sha256"]) == (ict.url, digest)
    assert "init" not in MlflowClient(place.mlflow).get_run(ict.mlflow_run).data.params
    notes = json.loads((Path(checkpoints.latest_checkpoint(tuned.url)) / runs.NOTES).read_text())
    assert notes["run"]["init_sha256"] == digest


@pytest.mark.slow
def test_a_worker_killed_before_the_first_checkpoint_starts_from_it_again(place: Place, ict: runs.Run, tuned: runs.Run):
    options = place.options(FINETUNE, init=ict.url)
    killed: list[int] = []
    thread = threading.Thread(target=kill_a_worker, args=(killed,))
    thread.start()
    run = launch(check(options))
    thread.join()
    assert killed
    K = options.config.train.iterations
    assert same(weights(run, K), weights(tuned, K))


def kill_a_worker(killed: list[int]) -> None:
    """Kill the first training worker that comes up, before it can have trained to a checkpoint."""
    until = time.monotonic() + 120
    while not killed and time.monotonic() < until:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and "RayTrainWorker" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
                    return
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("record", [None, '{"checkpoint_results": []}'])
def test_a_run_that_has_nothing_but_its_start_resumes_from_it(place: Place, tuned: runs.Run, record: str | None):
    name = f"{tuned.name}-alone"
    alone = replace(tuned, name=name)
    shutil.rmtree(alone.url, ignore_errors=True)
    shutil.copytree(f"{first(tuned)}", f"{first(alone)}")
    runs.write_run(alone)
    if record:
        (Path(alone.url) / checkpoints.RAY_RECORD).write_text(record)
    planned = check(place.options(FINETUNE, resume=name))
    assert planned.resumed and planned.initial is None
    assert (planned.fallback or first(planned.resumed)) == first(alone)


# ---- what cannot be a start

Make = Callable[..., str]


@pytest.fixture
def finetune(command: Command, place: Place, tmp_path: Path) -> Callable[..., Outcome]:
    """`pipelines.train digits-finetune --smoke` with a storage of the test's own."""

    def run(*arguments: str) -> Outcome:
        where = ("--storage", str(tmp_path / "runs"), "--data", str(place.root / "data"))
        return command("train", FINETUNE, "--smoke", *where, *arguments)

    return run


@pytest.fixture
def saved(tmp_path: Path) -> Make:
    """Saves a model of random weights that differs from digits-ict-smoke in some fields; its URL."""

    def make(objective: str = "ct", **network: Any) -> str:
        config = recipe(ICT, smoke=True)
        config = replace(
            config,
            network=replace(config.network, **network),
            train=replace(config.train, objective=objective),
        )
        state = TrainState(BCM(build_network(config.network)), config.train)
        folder = tmp_path / "models" / "checkpoint"
        save_checkpoint(folder, state, config.network)
        (folder / SCHEDULES).write_text("{}")
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ({"classes": 10}, "classes is 10, not 0"),
        ({"resolution": 16}, "resolution is 16, not 8"),
        ({"width": 12}, "width is 12, not 8"),
        ({"image_channels": 3}, "image_channels is 3, not 1"),
    ],
)
def test_a_model_of_another_shape_is_refused(
    finetune: Callable[..., Outcome], saved: Make, difference: dict[str, Any], said: str
):
    source = saved(**difference)
    error = finetune("--init", source).error
    assert f"{source} does not fit recipe {FINETUNE}-smoke: {said}. Give --init a model of the same network" in error


def test_a_model_that_is_bidirectional_already_is_refused(finetune: Callable[..., Outcome], saved: Make):
    source = saved(objective="bct", times=2)
    assert f"--init {source}: this network reads two times already" in finetune("--init", source).error


def test_a_denoiser_is_refused(finetune: Callable[..., Outcome], saved: Make):
    error = finetune("--init", saved(objective="edm")).error
    assert "objective edm: it is a denoiser and no consistency model" in error


def test_a_damaged_or_missing_model_is_refused(finetune: Callable[..., Outcome], saved: Make, tmp_path: Path):
    source = saved()
    flip_a_byte(Path(source) / "ema.safetensors")
    assert f"{source}/ema.safetensors is missing or does not match the SHA-256" in finetune("--init", source).error
    assert "no run and no finished checkpoint at" in finetune("--init", str(tmp_path / "nowhere")).error
    assert "names no model; write models:/<name>@<alias>" in finetune("--init", "models:/x").error
    assert not (tmp_path / "runs").exists()


def test_dropout_may_differ(saved: Make):
    config = recipe(FINETUNE, smoke=True)
    BCM(build_network(config.network)).load_state_dict(open_initial(saved(dropout=0.1), config).model.state_dict())


def test_each_recipe_says_whether_it_wants_a_model_to_start_from(
    command: Command, finetune: Callable[..., Outcome], saved: Make, place: Place
):
    error = finetune().error
    assert f"recipe {FINETUNE}-smoke starts from a trained network of one time: give it by --init MODEL" in error
    error = command("train", "digits", "--smoke", "--data", str(place.root / "data"), "--init", saved()).error
    assert "recipe digits-smoke trains from scratch; leave --init out" in error
    assert "leave --init out" in finetune("--resume", "x", "--init", "y").error
    assert "the recipe comes before --init" in command("train", "--init", "x").error


def test_a_dry_run_describes_the_stages(finetune: Callable[..., Outcome]):
    outcome = finetune("--dry-run", "--init", "anything")
    assert outcome.code == 0 and "N=41 from step 0, N=61 from step 24" in outcome.out
