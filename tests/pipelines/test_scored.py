"""A model is registered with the scores that are its own."""

import json
import re
import shutil
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from world import NAME, STEP, Command, World, edit_json, scores

from bcm.checkpoint import INDEX, save_checkpoint
from bcm.networks import build_network
from bcm.precond import BCM
from bcm.training import TrainState
from pipelines.evaluation.scores import FILE, Score, read_scores
from pipelines.models.checkpoints import checkpoint_name
from pipelines.models.source import model_at
from pipelines.recipes import recipe


def test_a_run_without_scores_is_not_registered(command: Command, world: World):
    error = command("register", str(world.run)).error
    assert f"{NAME} has no scores yet. Run `{sys.executable} -m pipelines.evaluate {world.run}`" in error


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 20}, f"those of step 20, but it is at step {STEP} now"),
        ({"schedules": {}}, "the time steps of .* have changed since it was scored"),
        ({"ema_rate": 0.5}, "those of the average of rate 0.5; give the same --ema-rate"),
        ({"rows": [{"metric": "mse"}]}, "scores.json: missing key 'rows.0.task'"),
        ({"rows": None}, "scores.json: rows: input should be"),
    ],
)
def test_scores_of_something_else_are_not_registered(command: Command, world: World, change: dict[str, Any], said: str):
    (world.run / FILE).write_text(json.dumps(scores(world) | change))
    error = command("register", str(world.run)).error
    assert re.search(said, error)
    assert f"Run `{sys.executable} -m pipelines.evaluate {world.run}`" in error


def test_scores_of_the_newest_checkpoint_may_be_registered(command: Command, world: World):
    (world.run / FILE).write_text(json.dumps(scores(world)))
    outcome = command("register", str(world.run), "--dry-run")
    assert outcome.out == f"would register {world.checkpoint} as bcm-digits-smoke with {{'mse_nfe4': 0.01}}\n"


def test_an_average_can_be_chosen_where_several_were_kept(command: Command, world: World):
    config = recipe("digits", smoke=True)
    state = TrainState(BCM(build_network(config.network)), replace(config.train, ema_rates=(0.9, 0.5)))
    state.k = STEP
    for parameter in state.averages[0.5].parameters():
        parameter.data += 1
    save_checkpoint(world.checkpoint, state, config.network)
    (world.run / FILE).write_text(json.dumps(scores(world) | {"ema_rate": 0.5}))
    assert "version 1" in command("register", str(world.run), "--ema-rate", "0.5").out
    for source, rate, average in (
        (str(world.run), None, state.averages[0.9]),
        (str(world.run), 0.5, state.averages[0.5]),
        ("models:/bcm-digits-smoke@champion", None, state.averages[0.5]),
    ):
        found = model_at(source).open(ema_rate=rate).model
        assert all(torch.equal(p, q) for p, q in zip(found.parameters(), average.parameters(), strict=True))
    for line in (("sample",), ("evaluate", "--dry-run")):
        assert "none of 0.7" in command(*line, str(world.run), "--ema-rate", "0.7").error
        said = command(*line, "models:/bcm-digits-smoke@champion", "--data", str(world.data), "--ema-rate", "0.5").error
        assert "holds one average of the weights" in said


def test_what_was_scored_is_registered_though_a_newer_checkpoint_comes(
    command: Command, world: World, monkeypatch: pytest.MonkeyPatch
):
    (world.run / FILE).write_text(json.dumps(scores(world)))

    def then_a_newer_one(*arguments: Any) -> tuple[Score, ...]:
        rows = read_scores(*arguments)
        newer = world.run / checkpoint_name(STEP + 1)
        shutil.copytree(world.checkpoint, newer)
        edit_json(newer / INDEX, lambda entry: entry.update(k=STEP + 1))
        return rows

    monkeypatch.setattr("pipelines.register.read_scores", then_a_newer_one)
    assert "version 1" in command("register", str(world.run)).out
    assert model_at(str(world.run)).open().k == STEP + 1
    assert model_at("models:/bcm-digits-smoke@champion").open().k == STEP
