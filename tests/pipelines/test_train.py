"""Bad input to training: what is wrong is found before Ray starts, and leaves nothing behind."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from spoil import LISTED, READ, Spoil, says_so, wider, without_weights
from world import NAME, Command, Outcome, World, edit_json

from bcm.networks import build_network
from bcm.precond import BCM
from data.manifest import MANIFEST_NAME
from pipelines.cli import parse
from pipelines.models import checkpoints
from pipelines.models import run as runs
from pipelines.recipes import recipe
from pipelines.train import TrainOptions, check
from pipelines.training.launch import launch, store_first_checkpoint


@pytest.fixture
def train_digits(command: Command, world: World) -> Command:
    """`pipelines.train digits --smoke` on the world's data, as typed; it finds what is wrong before Ray starts."""

    def run(*arguments: str) -> Outcome:
        place = ("--storage", str(world.runs), "--data", str(world.data))
        return command("train", "digits", "--smoke", *place, *arguments)

    return run


@pytest.fixture
def train_in_session(command: Command, world: World, ray_session: None) -> Command:
    """The same in a Ray that runs already."""

    def main(argv: Sequence[str]) -> None:
        launch(check(parse(TrainOptions, argv, "train", TrainOptions(config=recipe("digits", smoke=True)))))

    def run(*arguments: str) -> Outcome:
        return command(main, "--storage", str(world.runs), "--data", str(world.data), *arguments)

    return run


def new_runs(world: World) -> Iterable[str]:
    return {path.name for path in world.runs.iterdir()} - {NAME}


@pytest.mark.parametrize(("spoil", "said"), LISTED + READ)
def test_training_refuses_shards_that_are_not_whole(train_digits: Command, world: World, spoil: Spoil, said: str):
    spoil(world)
    says_so(train_digits(), said, world)
    assert not new_runs(world)


def test_training_refuses_what_cannot_work(train_digits: Command, world: World, tmp_path: Path):
    (tmp_path / "file").write_text("")
    error = train_digits("--storage", f"{tmp_path}/file/runs").error
    assert f"cannot write to {tmp_path}/file/runs" in error and "choose another path" in error
    error = train_digits("--network.image-channels", "3").error
    assert f"makes images of 8 px and 3 channels, but {world.data} holds 8 px and 1 channels" in error
    error = train_digits("--dataset", "cifar10").error
    assert "trains on cifar10" in error and "Give --data" in error
    assert "network.classes is 7" in train_digits("--network.classes", "7").error
    assert not new_runs(world)


def test_training_refuses_more_than_the_cluster_has(train_in_session: Command, world: World):
    error = train_in_session("--scaling.workers", "16").error
    assert "16 workers" in error and "ask for fewer workers" in error
    assert not new_runs(world)


def test_training_refuses_to_resume_what_does_not_fit(train_digits: Command, world: World):
    assert f"did you mean '{NAME}'?" in train_digits("--resume", NAME[:-1] + "x").error
    assert "no run and no finished checkpoint at" in train_digits("--resume", "").error
    error = train_digits("--resume", NAME, "--network.width", "16").error
    assert f"run {NAME} cannot be resumed with other options: network.width was 8, now 16" in error
    edit_json(world.data / MANIFEST_NAME, lambda entry: entry["splits"].pop("test"))
    assert "trained on another data set" in train_digits("--resume", NAME).error


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (wider, "holds another architecture: width is 16, not 8"),
        (without_weights, "{checkpoint}/ema.safetensors is missing or does not match the SHA-256"),
    ],
)
def test_training_refuses_to_resume_from_a_wrong_checkpoint(
    train_digits: Command, world: World, spoil: Spoil, said: str
):
    spoil(world)
    assert said.format(checkpoint=world.checkpoint) in train_digits("--resume", NAME).error


def test_a_half_stored_checkpoint_is_passed_over_where_rays_record_is_lost(
    world: World, capsys: pytest.CaptureFixture[str]
):
    half = world.run / checkpoints.checkpoint_name(1000)
    shutil.copytree(world.checkpoint, half)
    (half / "model.safetensors").unlink()
    options = TrainOptions(
        config=recipe("digits", smoke=True), storage=str(world.runs), data=str(world.data), resume=NAME
    )
    assert check(options).fallback == str(world.checkpoint)
    assert f"passing over checkpoints that are not whole: {half.name}" in capsys.readouterr().out


def test_a_run_with_a_gpus_switches_is_planned_and_stored_on_a_machine_without_one(world: World):
    config = recipe("digits", smoke=True)
    config = replace(config, train=replace(config.train, channels_last=True))
    edit_json(world.run / runs.RECORD, lambda entry: entry["config"]["train"].update(channels_last=True))
    planned = check(TrainOptions(config=config, storage=str(world.runs), data=str(world.data), resume=NAME))
    assert planned.fallback == str(world.checkpoint) and planned.resumed is not None
    begun = replace(planned.resumed, name="begun", init="elsewhere")
    store_first_checkpoint(begun, BCM(build_network(config.network)))
    assert checkpoints.index_of(f"{world.runs}/begun/{checkpoints.checkpoint_name(0)}").k == 0


def test_training_refuses_to_resume_a_run_that_mlflow_does_not_know(train_in_session: Command, world: World):
    edit_json(world.run / runs.RECORD, lambda entry: entry.update(mlflow_run="0" * 32))
    assert f"the run {'0' * 32} cannot be continued" in train_in_session("--resume", NAME).error


def test_training_leaves_no_run_behind_where_mlflow_is_down(train_digits: Command, world: World, no_server: str):
    error = train_digits().error
    assert f"MLflow at {no_server}: " in error and "mlflow server" in error
    assert not new_runs(world)


def test_training_wants_the_recipe_first(command: Command):
    assert "the recipe comes before --dry-run" in command("train", "--dry-run", "digits").error
