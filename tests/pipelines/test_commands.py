"""Every command answers --help, and bad input with one message that names the thing and the remedy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from spoil import (
    LISTED,
    READ,
    Spoil,
    flip_a_byte,
    of_unknown_kind,
    says_so,
    unfinished,
    wider,
    with_a_list_of_schedules,
    with_another_record,
    with_cut_index,
    with_cut_record,
    with_cut_schedules,
    with_disordered_schedules,
    with_misnamed_schedules,
    without_weights,
)
from world import NAME, STEP, Command, Outcome, World, edit_json, scores, tree

from bcm.inference import SCHEDULES
from data.manifest import MANIFEST_NAME
from pipelines.evaluation.scores import FILE
from pipelines.models import run as runs
from pipelines.tracking import client as tracking

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    *("prepare", "train", "evaluate", "tune", "register", "sample"),
    *("import_weights", "report", "quickstart"),
)
OPENING = ("evaluate", "tune", "register", "sample")
"""The commands that open a model."""


# ---- options


@pytest.mark.parametrize("module", COMMANDS)
def test_help_is_answered(command: Command, module: str):
    outcome = command(module, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"-m pipelines.{module}" in outcome.out
    choices = {"train": ("digits",), "report": ("coverage",)}.get(module, ())
    options = command(module, *choices, "--help")
    assert options.code == 0 and "--dry-run" in options.out


def test_train_without_a_recipe_lists_them(command: Command):
    outcome = command("train")
    assert outcome.code == 0
    assert "--smoke" in outcome.out and "cifar10-bcm" in outcome.out
    assert "--train.learning-rate" in command("train", "digits", "--help").out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("prepare digits --too x", "--to"),
        ("train digits --train.batchsize 8", "--train.batch-size"),
        ("train digits --train.batch-size many", "many"),
        ("evaluate m --sample 3", "--samples"),
        ("evaluate m --samples 1", "Frechet distance needs at least 2"),
        ("evaluate", "Required options"),
        ("tune m --second 3", "--seconds"),
        ("tune m --targets sample-5", "did you mean 'sample-4'"),
        ("tune m --targets sample-1", "no time step to search"),
        ("tune m --targets sample-2 sample-2", "only once"),
        ("tune m --trials 0", "--trials must be at least 1"),
        ("register r --nam x", "--name"),
        ("sample m --task invret", "invert"),
        ("sample m --count 0", "--count must be at least 1"),
        ("sample m --task all --nfe 2", "--task all draws every NFE; leave --nfe out"),
        ("quickstart --sed 1", "--seed"),
    ],
)
def test_a_wrong_option_is_explained(command: Command, line: str, said: str):
    outcome = command(*line.split())
    assert outcome.code == 2
    assert said in " ".join(outcome.err.replace("│", " ").split())
    assert "Traceback" not in outcome.err and outcome.out == ""


def test_wrong_values_of_a_recipe_are_explained(command: Command):
    line = ("train", "digits", "--dry-run")
    assert "does not divide among scaling.workers 3" in command(*line, "--scaling.workers", "3").error
    outcome = command(*line, "--network.width", "3")
    assert outcome.code == 2 and "width is 3" in outcome.err
    assert "did you mean 'digits'? Known: digits, " in command("train", "digitz").error


def test_an_unknown_data_set_is_explained(command: Command):
    assert "unknown data set 'digitz': did you mean 'digits'? " in command("prepare", "digitz").error
    assert "cifar10 needs a source" in command("prepare", "cifar10").error


# ---- dry runs


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("prepare digits --to new --dry-run", "1,500 images, 10 classes"),
        ("train digits --smoke --dry-run", '"width": 8'),
        ("train digits --dry-run", "parameters"),
        ("evaluate {run} --dry-run", f"after {STEP} steps"),
        ("evaluate {checkpoint} --dry-run", f"after {STEP} steps"),
        ("tune {run} --dry-run", "sample-3: time_1, noise_1; now {'kind': 'zigzag'"),
        ("sample {run} --dry-run", "generate with Combined"),
        ("sample {checkpoint} --task invert --nfe 2 --dry-run", "invert with Inversion"),
        ("sample {run} --task all --dry-run", f"would draw 16 images of each kind -> runs/pictures/{NAME}-all.png"),
        ("quickstart --dry-run", "register"),
    ],
)
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(command: Command, world: World, line: str, said: str):
    before = tree(world.root)
    outcome = command(*line.format(run=world.run, checkpoint=world.checkpoint).split())
    assert (outcome.code, outcome.err) == (0, "")
    assert said in outcome.out
    assert {path for path in tree(world.root) - before if not path.startswith("cache")} == set()


# ---- models that cannot be opened


@pytest.mark.parametrize("module", OPENING)
def test_a_run_that_does_not_exist_names_its_neighbours(command: Command, world: World, module: str):
    error = command(module, f"runs/{NAME[:-1]}x").error
    assert f"at {world.runs}/{NAME[:-1]}x: did you mean '{NAME}'?" in error


@pytest.mark.parametrize("module", OPENING)
def test_a_damaged_checkpoint_is_named(command: Command, world: World, module: str):
    flip_a_byte(world.checkpoint / "ema.safetensors")
    (world.run / FILE).write_text(json.dumps(scores(world)))
    error = command(module, str(world.run)).error
    assert f"{world.checkpoint}/ema.safetensors is missing or does not match the SHA-256" in error
    assert "Choose another checkpoint" in error


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (wider, "{checkpoint}/ema.safetensors does not fit the network"),
        (
            of_unknown_kind,
            "{checkpoint}/checkpoint.json: network.kind: input tag 'unet' found using 'kind' does not match",
        ),
        (with_cut_index, "{checkpoint}/checkpoint.json: not valid JSON"),
        (unfinished, "has no finished checkpoint yet"),
        (without_weights, "{checkpoint}/ema.safetensors is missing or does not match the SHA-256"),
        (with_cut_schedules, "{run}/schedules.json: not valid JSON"),
        (with_a_list_of_schedules, "{run}/schedules.json: input should be an object, not [1, 2] Remove that file"),
        (with_disordered_schedules, "{run}/schedules.json: sample-2: ancestral: time 80.0 after 90.0 is out of order"),
        (with_misnamed_schedules, "schedule 'sample-7' holds "),
        (with_cut_record, "{run}/run.json: not valid JSON"),
        (with_another_record, "{run}/run.json: missing key 'storage'. It is damaged, or of another version"),
    ],
)
def test_a_run_that_cannot_be_used_says_which_file_is_wrong(command: Command, world: World, spoil: Spoil, said: str):
    spoil(world)
    error = command("sample", str(world.run), "--out", "picture.png").error
    assert said.format(run=world.run, checkpoint=world.checkpoint) in error
    assert not (world.root / "picture.png").exists()


@pytest.mark.parametrize("module", ["evaluate", "sample"])
def test_a_registered_model_that_does_not_exist_is_named(command: Command, world: World, module: str):
    error = command(module, "models:/bcm-digits@champion", "--data", str(world.data)).error
    assert "no models:/bcm-digits@champion; it has no registered model" in error
    error = command(module, "models:/bcm-digits", "--data", str(world.data)).error
    assert "'models:/bcm-digits' names no model; write models:/<name>@<alias>" in error


def test_a_registered_model_cannot_be_tuned_and_needs_its_data_named(command: Command, world: World):
    assert "Give the URL of the run it came from" in command("tune", "models:/x@champion").error
    assert "give --data" in command("evaluate", "models:/x@champion").error


def test_time_steps_that_a_model_has_not_are_named(command: Command, world: World):
    error = command("sample", str(world.run), "--nfe", "9").error
    assert "no time steps 'sample-9'; it has sample-1, sample-2, sample-3, sample-4" in error


def test_a_picture_that_cannot_be_written_is_named(command: Command, world: World):
    (world.root / "file").write_text("")
    assert "cannot write file/x.png: " in command("sample", str(world.run), "--out", "file/x.png").error


# ---- data


@pytest.mark.parametrize(("spoil", "said"), LISTED + READ)
@pytest.mark.parametrize("module", ["evaluate", "tune"])
def test_shards_that_cannot_be_used_are_named(command: Command, world: World, module: str, spoil: Spoil, said: str):
    spoil(world)
    says_so(command(module, str(world.run)), said, world)
    assert not (world.run / FILE).exists() and not (world.run / SCHEDULES).exists()


def test_data_of_another_shape_are_refused(command: Command, world: World):
    edit_json(world.data / MANIFEST_NAME, lambda entry: entry.update(resolution=16))
    for line in (("evaluate",), ("sample", "--task", "all"), ("sample", "--task", "invert")):
        error = command(*line, str(world.run), "--data", str(world.data)).error
        assert f"the model makes images of 8 px and 1 channels, but {world.data} holds 16 px" in error
        assert "Give --data that fits" in error


def test_shards_are_never_written_over_another_set_nor_where_nothing_can_be_written(command: Command, world: World):
    edit_json(world.data / MANIFEST_NAME, lambda entry: entry.update(name="other"))
    before = tree(world.data)
    error = command("prepare", "digits", "--to", str(world.data)).error
    assert "holds a different data set: its name is 'other'" in error
    assert tree(world.data) == before
    (world.root / "file").write_text("")
    error = command("prepare", "digits", "--to", f"{world.root}/file/data").error
    assert f"cannot write to {world.root}/file/data" in error and "choose another path" in error


# ---- MLflow


@pytest.mark.parametrize("module", ["evaluate", "tune", "register"])
def test_a_server_that_is_down_is_named_before_the_work_starts(
    command: Command, world: World, no_server: str, module: str
):
    (world.run / FILE).write_text(json.dumps(scores(world)))
    before = tree(world.runs)
    error = command(module, str(world.run)).error
    assert f"MLflow at {no_server}: " in error
    assert "mlflow server" in error and tracking.URI_VARIABLE in error
    assert tree(world.runs) == before


def test_a_registered_model_behind_a_server_that_is_down(command: Command, world: World, no_server: str):
    error = command("sample", "models:/bcm-digits@champion").error
    assert f"MLflow at {no_server}: " in error and "mlflow server" in error


def test_a_store_that_does_not_know_the_run_is_named(command: Command, world: World):
    edit_json(world.run / runs.RECORD, lambda entry: entry.update(mlflow_run="0" * 32))
    for module in ("evaluate", "tune"):
        error = command(module, str(world.run)).error
        assert f"the run {'0' * 32} of {NAME} cannot be found" in error and world.mlflow in error


# ---- the real thing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train digitz", "unknown recipe 'digitz': did you mean 'digits'?"),
        ("evaluate nowhere", "no run and no finished checkpoint at {root}/nowhere"),
    ],
)
def test_the_exit_code_is_2_and_the_message_is_all(tmp_path: Path, line: str, said: str):
    module, *arguments = line.split()
    done = subprocess.run(
        [sys.executable, "-m", f"pipelines.{module}", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert outcome.error.startswith(said.format(root=tmp_path))
    assert outcome.out == ""
    assert tree(tmp_path) == set()
