"""The record of a run, its checkpoints, and what may change when it goes on."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from world import NAME, STEP, World, edit_json

from bcm.checkpoint import INDEX
from bcm.types import BCMError
from cluster.runtime_env import SHA_VARIABLE
from data import store
from pipelines.errors import ConfigError
from pipelines.models import checkpoints
from pipelines.models import run as runs
from pipelines.models.source import model_at
from pipelines.recipes import recipe
from pipelines.training.checks import check_same


def test_a_record_survives_storage(tmp_path: Path):
    run = runs.Run(
        name="digits-1",
        storage=str(tmp_path),
        data="s3://bucket/digits",
        manifest_sha256="ab",
        mlflow_run="cd",
        code="ef+dirty",
        config=recipe("digits"),
    )
    runs.write_run(run)
    assert runs.read_run(f"{tmp_path}/digits-1") == run
    assert runs.read_run(f"{tmp_path}/digits-1/") == run
    check_same(run, recipe("digits"), "ab")


def test_names_are_new_and_sort_by_recipe_and_time():
    names = {runs.new_name("digits") for _ in range(50)}
    assert len(names) > 45
    assert all(re.fullmatch(r"digits-\d{8}-\d{6}-[0-9a-f]{4}", name) for name in names)


def test_the_code_version_is_what_the_job_was_submitted_with(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SHA_VARIABLE, "0123abc")
    assert runs.code_version() == "0123abc"


def test_a_missing_run_lists_those_beside_it(world: World):
    shutil.copytree(world.run, world.runs / "cifar10-1")
    (world.runs / "data").mkdir()
    with pytest.raises(ConfigError) as raised:
        runs.read_run(f"{world.runs}/digits-smoke-20260101-000000-abcc")
    message = str(raised.value)
    assert f"at {world.runs}/digits-smoke-20260101-000000-abcc: did you mean '{NAME}'? " in message
    assert message.endswith(f"Known: cifar10-1, {NAME}.")
    with pytest.raises(ConfigError, match=f"{world.data} holds no runs"):
        runs.read_run(f"{world.data}/x")


def test_a_run_is_where_it_was_found(world: World):
    """Storage that was copied or moved needs no edits."""
    world.runs.rename(world.root / "elsewhere")
    run = runs.read_run(f"{world.root}/elsewhere/{NAME}")
    assert run.url == f"{world.root}/elsewhere/{NAME}"
    (world.root / "elsewhere" / NAME).rename(world.root / "elsewhere" / "renamed")
    with pytest.raises(ConfigError, match=f"is the run {NAME} under another name"):
        runs.read_run(f"{world.root}/elsewhere/renamed")


@pytest.mark.parametrize("text", ["[]", '"run"', "{}", '{"name": "x"}'])
def test_a_record_of_another_form_is_refused(world: World, text: str):
    (world.run / runs.RECORD).write_text(text)
    with pytest.raises(ConfigError, match=f"{NAME}/run.json: .*It is damaged, or of another version"):
        runs.read_run(str(world.run))


@pytest.mark.parametrize(("key", "value"), [("config", "x"), ("data", 3), ("mlflow_run", None)])
def test_a_record_with_a_value_of_another_kind_is_refused(world: World, key: str, value: object):
    edit_json(world.run / runs.RECORD, lambda entry: entry.update({key: value}))
    with pytest.raises(ConfigError, match=f"run.json: {key}.*It is damaged, or of another version"):
        runs.read_run(str(world.run))


def test_only_the_scaling_may_change_when_a_run_is_resumed(world: World):
    run = runs.read_run(str(world.run))
    config = run.config
    check_same(run, replace(config, scaling=replace(config.scaling, workers=4, cpus_per_worker=2)), run.manifest_sha256)
    with pytest.raises(ConfigError) as raised:
        other = replace(config, train=replace(config.train, seed=1), network=replace(config.network, attention=(8,)))
        check_same(run, other, run.manifest_sha256)
    assert "network.attention was [], now [8]; train.seed was 0, now 1. Give the same, or start anew." in str(
        raised.value
    )
    with pytest.raises(ConfigError, match=r"on another data set .*, or before manifests had version 2, by which"):
        check_same(run, config, "0" * 64)


def test_the_newest_finished_checkpoint_is_found(world: World):
    newer = world.run / checkpoints.checkpoint_name(1000)
    shutil.copytree(world.checkpoint, newer)
    shutil.copytree(world.checkpoint, world.run / checkpoints.checkpoint_name(900))
    unfinished = world.run / checkpoints.checkpoint_name(2000)
    shutil.copytree(world.checkpoint, unfinished)
    (unfinished / INDEX).unlink()
    assert checkpoints.latest_checkpoint(str(world.run)) == str(newer)


def test_a_run_without_a_finished_checkpoint_says_so(world: World):
    (world.checkpoint / INDEX).unlink()
    with pytest.raises(ConfigError, match=f"{NAME} has no finished checkpoint yet"):
        checkpoints.latest_checkpoint(str(world.run))
    with pytest.raises(ConfigError, match=f"no run and no finished checkpoint at {world.checkpoint}"):
        model_at(str(world.checkpoint))


def test_a_run_and_its_checkpoint_lead_to_the_same_model(world: World):
    run, checkpoint = model_at(str(world.run)), model_at(f"{world.checkpoint}/")
    assert (
        (run.checkpoint, run.home)
        == (checkpoint.checkpoint, checkpoint.home)
        == (str(world.checkpoint), str(world.run))
    )
    assert run.run == checkpoint.run == runs.read_run(str(world.run))
    assert run.open().k == checkpoint.open().k == STEP


def test_inference_fetches_the_index_and_one_average_alone(world: World, monkeypatch: pytest.MonkeyPatch):
    fetched: list[str] = []
    fetch = store.fetch

    def noted(url: str, *arguments: Any) -> None:
        fetched.append(url.rpartition("/")[2])
        fetch(url, *arguments)

    monkeypatch.setattr(store, "fetch", noted)
    model_at(str(world.run)).open()
    assert fetched == [INDEX, "ema.safetensors"]


def test_a_copy_is_gone_after_use(world: World):
    with checkpoints.local_copy(str(world.checkpoint), lambda index: index.files) as folder:
        assert sorted(path.name for path in folder.iterdir()) == sorted(p.name for p in world.checkpoint.iterdir())
    assert not folder.exists()


def test_what_is_wrong_with_a_copy_is_said_of_its_source(world: World):
    weights = world.checkpoint / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BCMError, match=f"{weights} is missing or does not match"):
        model_at(str(world.run)).open()


def test_checkpoint_names_sort_by_step():
    steps = [5, 40, 300, 99_999, 100_000, 400_000]
    assert sorted(map(checkpoints.checkpoint_name, reversed(steps))) == [checkpoints.checkpoint_name(k) for k in steps]
    assert store.join("s3://b/run", checkpoints.checkpoint_name(5)) == "s3://b/run/checkpoint_000000005"


def test_rays_record_says_which_checkpoints_are_whole(world: World):
    later = world.run / checkpoints.checkpoint_name(1000)
    shutil.copytree(world.checkpoint, later)
    record = world.run / checkpoints.RAY_RECORD
    assert checkpoints.committed(str(world.run)) is None
    assert checkpoints.checkpoints(str(world.run)) == [world.checkpoint.name, later.name]

    record.write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": world.checkpoint.name}]}))
    assert checkpoints.checkpoints(str(world.run)) == [world.checkpoint.name]
    checkpoints.forget_damaged_record(str(world.run))
    assert record.exists()


@pytest.mark.parametrize(
    "damaged", ['{"ray_version": ', "[]", '{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_gone"}]}']
)
def test_a_damaged_record_is_forgotten_and_the_checkpoints_speak(world: World, damaged: str):
    record = world.run / checkpoints.RAY_RECORD
    record.write_text(damaged)
    assert checkpoints.committed(str(world.run)) is None
    assert checkpoints.latest_checkpoint(str(world.run)) == str(world.checkpoint)
    checkpoints.forget_damaged_record(str(world.run))
    assert not record.exists()
