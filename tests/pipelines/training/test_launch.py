"""From a checked training to its worker, which runs in this process; what MLflow and the storage then hold."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run as Tracked
from world import NAME, World

from bcm import strict
from bcm.checkpoint import attachment, load_checkpoint
from bcm.networks import build_network
from bcm.precond import BCM
from bcm.timesteps import PUBLISHED, Ancestral
from cluster import options, ray_internals, session
from data import store
from data.cache import BUDGET_VARIABLE, CACHE_VARIABLE
from data.errors import StorageError
from data.manifest import load_manifest
from pipelines.errors import ConfigError, TrackingError
from pipelines.models import checkpoints
from pipelines.models.run import NOTES, Notes, read_run
from pipelines.tracking import client
from pipelines.training import launch
from pipelines.training.callbacks import FinalErrors
from pipelines.training.checks import Initial, Training, idle_state
from pipelines.training.worker import Job

TAUGHT = "models:/taught@best"


@dataclass
class Stage:
    """What stands around one launch: the nodes, and the worker that is called in this process."""

    training: Training
    worker: Callable[[Job], object] = lambda job: 0
    nodes: list[bool] = field(default_factory=lambda: [True])
    """Whether each node is alive."""
    trainers: list[Any] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)

    @property
    def job(self) -> Job:
        assert len(self.trainers) == len(self.jobs) == 1
        return self.jobs[0]

    def train_worker(self, entry: dict[str, Job]) -> object:
        self.jobs.append(entry["job"])
        return self.worker(entry["job"])

    def alive(self) -> list[dict[str, Any]]:
        return [{"Alive": alive, "Resources": {"CPU": 8.0, "GPU": 8.0}} for alive in self.nodes]


@pytest.fixture
def stage(world: World, monkeypatch: pytest.MonkeyPatch) -> Stage:
    import ray

    run = read_run(str(world.run))
    made = Stage(
        Training(
            config=run.config,
            storage=str(world.runs),
            data=str(world.data),
            manifest=load_manifest(str(world.data)),
            tracking_uri=client.resolve_uri("runs"),
            experiment="bcm",
        )
    )
    scaling_config, fit = options.scaling_config, options.fit

    def local(scaling: options.ScalingOptions) -> Any:
        return scaling_config(scaling, local=True)

    def seen(trainer: Any) -> Any:
        made.trainers.append(trainer)
        return fit(trainer)

    monkeypatch.setattr(ray, "nodes", made.alive)
    monkeypatch.setattr(ray_internals, "most_resources", dict)
    monkeypatch.setattr(options, "scaling_config", local)
    monkeypatch.setattr(options, "fit", seen)
    monkeypatch.setattr(launch, "line_queue", lambda: None)
    monkeypatch.setattr(launch, "train_worker", made.train_worker)
    return made


def resumed(stage: Stage, world: World, fallback: str | None = None, **changes: str) -> Training:
    """The world's own run, to be gone on with."""
    return replace(stage.training, resumed=replace(read_run(str(world.run)), **changes), fallback=fallback)


def initial(stage: Stage) -> Initial:
    torch.manual_seed(7)
    return Initial(BCM(build_network(stage.training.config.network)), TAUGHT, "0" * 64)


def tracked(world: World) -> list[Tracked]:
    """The runs in MLflow beside that of the world, the newest first."""
    mlflow = MlflowClient(world.mlflow)
    experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    return [run for run in mlflow.search_runs(experiments) if run.info.run_name != NAME]


def status(run_id: str) -> str:
    return MlflowClient(client.resolve_uri("runs")).get_run(run_id).info.status


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_a_run_is_running_while_it_trains_and_finished_after(stage: Stage):
    seen: list[str] = []
    stage.worker = lambda job: seen.append(status(job.run.mlflow_run))
    run = launch.launch(stage.training)
    assert seen == ["RUNNING"] and status(run.mlflow_run) == "FINISHED"
    assert read_run(run.url) == run == stage.job.run
    assert stage.job.fallback is None and not store.exists(store.join(run.url, checkpoints.checkpoint_name(0)))


def test_the_time_steps_stand_in_the_record_of_a_run(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    published = {"sample-1": Ancestral()}
    with monkeypatch.context() as patch:
        patch.setitem(PUBLISHED, stage.training.config.time_steps, published)  # type: ignore[arg-type]
        run = launch.launch(stage.training)
    assert read_run(run.url).schedules == published == stage.job.run.schedules


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (ValueError("a bug"), "FAILED"),
        (StorageError("no answer"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(1), "KILLED"),  # what Ray makes of Ctrl-C
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_how_a_run_ended_is_told_to_mlflow(stage: Stage, world: World, error: BaseException, ending: str):
    stage.worker = raising(error)
    with pytest.raises(KeyboardInterrupt if ending == "KILLED" else type(error)):
        launch.launch(stage.training)
    assert [run.info.status for run in tracked(world)] == [ending]


def test_a_resumed_run_is_running_again_and_told_how_it_ended(stage: Stage, world: World):
    training = resumed(stage, world)
    assert training.resumed
    client.finish_run(world.mlflow, training.resumed.mlflow_run, "KILLED")
    seen: list[str] = []
    stage.worker = lambda job: seen.append(status(job.run.mlflow_run))
    assert launch.launch(training) == training.resumed
    assert seen == ["RUNNING"] and status(training.resumed.mlflow_run) == "FINISHED" and tracked(world) == []


@pytest.mark.parametrize("error", [StorageError("storage is away"), KeyboardInterrupt()], ids=["storage", "ctrl-c"])
@pytest.mark.parametrize("failing", ["upload", "write_run"])
def test_a_begun_run_that_cannot_be_recorded_is_failed_in_mlflow(
    stage: Stage, world: World, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
):
    monkeypatch.setattr(launch, failing, raising(error))
    with pytest.raises(type(error)):
        launch.launch(replace(stage.training, initial=initial(stage)))
    assert [run.info.status for run in tracked(world)] == ["FAILED"] and stage.trainers == []


def test_a_mlflow_that_is_gone_at_the_end_is_a_warning(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(client, "finish_run", raising(TrackingError("MLflow is away")))
    run = launch.launch(stage.training)
    said = f"warning: MLflow is away\nSend what is missing later: --resume {run.name}\n"
    assert said in capsys.readouterr().err
    stage.worker = raising(ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        launch.launch(stage.training)


def test_points_that_mlflow_did_not_get_are_told_at_the_end(stage: Stage, capsys: pytest.CaptureFixture[str]):
    launch.launch(stage.training)
    assert "warning: " not in capsys.readouterr().err
    stage.worker = lambda job: 4
    run = launch.launch(stage.training)
    assert capsys.readouterr().err == (
        "warning: 4 points of metrics have not reached MLflow; they stand in the last checkpoint. "
        f"Send them when it answers again: --resume {run.name}\n"
    )


@pytest.mark.parametrize("from_model", [False, True], ids=["random", "init"])
def test_mlflow_is_told_what_a_run_was_started_with(stage: Stage, world: World, from_model: bool):
    run = launch.launch(replace(stage.training, initial=initial(stage) if from_model else None))
    (kept,) = tracked(world)
    params, tags = kept.data.params, kept.data.tags
    assert kept.info.run_id == run.mlflow_run and kept.info.run_name == run.name
    assert params["data"] == str(world.data) and params["storage"] == str(world.runs)
    assert params["train.seed"] == str(run.config.train.seed) and params["recipe"] == run.config.recipe
    assert tags["run"] == run.name and tags["recipe"] == run.config.recipe and tags["code"] == run.code
    assert tags["manifest_sha256"] == run.manifest_sha256 == stage.training.manifest.sha256
    said = {name: value for name, value in params.items() if name.startswith("init")}
    assert said == ({"init": TAUGHT, "init_sha256": "0" * 64} if from_model else {})
    assert (run.init, run.init_sha256) == (said.get("init", ""), said.get("init_sha256", ""))


def test_the_trainer_has_the_callback_the_storage_and_the_variables_of_the_cache(
    stage: Stage, world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(BUDGET_VARIABLE, raising=False)
    run = launch.launch(stage.training)
    config = stage.trainers[0].run_config
    assert [type(callback) for callback in config.callbacks] == [FinalErrors]
    assert (config.name, config.storage_path) == (run.name, str(world.runs))
    cache = str(world.root / "cache")
    assert config.worker_runtime_env == {"env_vars": {CACHE_VARIABLE: cache}}
    monkeypatch.setenv(BUDGET_VARIABLE, "3")
    launch.launch(stage.training)
    variables = stage.trainers[1].run_config.worker_runtime_env["env_vars"]
    assert variables == {CACHE_VARIABLE: cache, BUDGET_VARIABLE: "3"}


def test_a_run_from_a_model_begins_at_a_first_checkpoint_that_holds_it(stage: Stage):
    first, config = initial(stage), stage.training.config
    taken: list[Notes] = []

    def worker(job: Job) -> None:
        assert job.fallback
        with job.fallback.as_directory() as folder:
            state = idle_state(BCM(build_network(config.network)), config)
            load_checkpoint(Path(folder), state, config.network)
            assert state.k == 0
            for ours, theirs in zip(state.model.parameters(), first.model.parameters(), strict=True):
                assert torch.equal(ours, theirs)
            taken.append(strict.read(Notes, attachment(Path(folder), NOTES), NOTES, complete=True))

    stage.worker = worker
    run = launch.launch(replace(stage.training, initial=first))
    assert taken == [Notes(run=run, images_seen=0)]
    assert checkpoints.latest_checkpoint(run.url) == store.join(run.url, checkpoints.checkpoint_name(0))


@pytest.mark.parametrize(("init", "newest"), [("", True), (TAUGHT, True), (TAUGHT, False)])
def test_a_resumed_run_goes_on_from_its_newest_checkpoint_or_its_first(
    stage: Stage, world: World, init: str, newest: bool
):
    launch.launch(resumed(stage, world, str(world.checkpoint) if newest else None, init=init))
    start = world.checkpoint if newest else world.run / checkpoints.checkpoint_name(0)
    assert stage.job.fallback and stage.job.fallback.path == str(start)


def test_a_damaged_record_of_rays_is_gone_when_a_resumed_run_starts(stage: Stage, world: World):
    record = world.run / checkpoints.RAY_RECORD
    record.write_text('{"ray_version": ')
    there: list[bool] = []
    stage.worker = lambda job: there.append(record.exists())
    launch.launch(resumed(stage, world, str(world.checkpoint)))
    assert there == [False]


def test_a_run_that_cannot_be_resumed_is_not_set_to_running(
    stage: Stage, world: World, monkeypatch: pytest.MonkeyPatch
):
    training = resumed(stage, world)
    assert training.resumed
    client.finish_run(world.mlflow, training.resumed.mlflow_run, "FAILED")
    monkeypatch.setattr(launch, "forget_damaged_record", raising(StorageError("storage is away")))
    with pytest.raises(StorageError):
        launch.launch(training)
    assert status(training.resumed.mlflow_run) == "FAILED"


@pytest.mark.parametrize(("nodes", "in_job"), [(2, False), (1, True)])
def test_a_local_store_of_mlflow_is_refused_where_others_cannot_reach_it(
    stage: Stage, world: World, monkeypatch: pytest.MonkeyPatch, nodes: int, in_job: bool
):
    stage.nodes = [True] * nodes
    monkeypatch.setattr(session, "in_job", lambda: in_job)
    with pytest.raises(ConfigError, match=r"is a file of this machine, out of reach.* Set MLFLOW_TRACKING_URI"):
        launch.launch(stage.training)
    assert tracked(world) == [] and stage.trainers == []


def test_a_server_may_serve_several_nodes(stage: Stage, no_server: str):
    stage.nodes = [True, True]
    with pytest.raises(TrackingError, match=no_server):
        launch.launch(replace(stage.training, tracking_uri=no_server))


def test_a_node_that_is_gone_is_no_second_node(stage: Stage):
    stage.nodes = [True, False]
    launch.launch(stage.training)
    assert len(stage.jobs) == 1
