"""What the commands make of an imported model."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from foreign import ADM, BCM, EDM, NCSNPP, Golden, golden, imported, write_shards
from mlflow.exceptions import MlflowException
from servers import served_model
from world import Command, World

from bcm.checkpoint import INDEX
from bcm.timesteps import CONSISTENCY_IMAGENET64
from pipelines.evaluation.scores import Score, Scores, write_scores
from pipelines.models.source import model_at
from pipelines.recipes import recipe
from pipelines.training.checks import open_initial


def test_an_imported_consistency_model_is_drawn_and_says_what_it_cannot(command: Command, file: Path, tmp_path: Path):
    to, out = imported(command, file), str(tmp_path / "x.png")
    for line in (
        ("sample", to, "--nfe", "2", "--label", "3"),
        ("sample", to, "--nfe", "1"),
        ("sample", to, "--task", "all"),
    ):
        assert command(*line, "--count", "2", "--out", out).code == 0
        Path(out).unlink()
    assert "needs one label in [0, 10)" in command("sample", to, "--label", "10", "--out", out).error
    assert "no time steps 'sample-4'; it has sample-1, sample-2" in command("sample", to, "--nfe", "4").error
    assert "has no inverse direction" in command("sample", to, "--task", "invert", "--out", out).error
    assert f"{to} does not say where its data is; give --data" in command("evaluate", to).error
    assert f"{to} is no training run, and there is none to search on" in command("tune", to).error
    assert not Path(out).exists()


def test_an_imported_bidirectional_model_inverts(command: Command, shared: Path, tmp_path: Path):
    torch.save(golden(shared, BCM).state, tmp_path / "bcm.pt")
    to, data = imported(command, tmp_path / "bcm.pt"), str(tmp_path / "data")
    write_shards(data)
    outcome = command("evaluate", to, "--data", data, "--dry-run")
    assert f"would measure {to} after 0 steps with sample-1, sample-2, sample-3, sample-4, invert-1" in outcome.out
    line = ("sample", to, "--task", "invert", "--nfe", "1", "--count", "2", "--data", data)
    assert command(*line, "--out", str(tmp_path / "x.png")).code == 0


def test_an_imported_consistency_model_is_fine_tuned_from(command: Command, file: Path, ict: Golden):
    to, config = imported(command, file), recipe("imagenet64-bcm", smoke=True)
    network = replace(model_at(to).open().network, times=2, dropout=0.2)
    initial = open_initial(to, replace(config, network=network))
    to_0 = torch.full_like(ict.t, 0.002)
    expected = model_at(to).open().model(ict.x, ict.t, to_0, ict.label)
    torch.testing.assert_close(initial.model.eval()(ict.x, ict.t, to_0, ict.label), expected)


def test_an_imported_denoiser_samples_nowhere(command: Command, shared: Path, tmp_path: Path):
    torch.save(golden(shared, NCSNPP).state, tmp_path / "edm.pt")
    to = imported(command, tmp_path / "edm.pt", EDM)
    write_shards(str(tmp_path / "data"))
    for line in (("sample", to), ("sample", to, "--task", "all"), ("evaluate", to, "--data", str(tmp_path / "data"))):
        assert "this model is a denoiser (objective edm)" in command(*line).error
    line = (str(tmp_path / "edm.pt"), *EDM, "--to", str(tmp_path / "new"), "--register", "edm")
    assert "this model is a denoiser" in command("import_weights", *line).error
    assert not (tmp_path / "new").exists()


def test_an_imported_model_is_registered_at_once_or_with_its_scores(command: Command, world: World, file: Path):
    to = str(world.root / "imported")
    outcome = command("import_weights", str(file), *ADM, "--to", to, "--register", "ict")
    assert outcome.out.endswith("ict version 1: ict had no champion\n"), outcome
    assert (
        f"imported has no scores yet. Run `{sys.executable} -m pipelines.evaluate {to}`"
        in command("register", to).error
    )
    steps = model_at(to).schedules()
    conditions: dict[str, Any] = {"error": None, "count": 10, "seeds": None, "extractor": "pixels", "steps": None}
    rows = (
        Score(metric="fd-pixels", task="real", nfe=0, value=2.0, **conditions),
        Score(metric="fd-pixels", task="sample", nfe=1, value=3.0, **conditions),
    )
    write_scores(to, Scores(k=0, ema_rate=None, schedules=steps, rows=rows))
    assert "has no recipe to be named after; give --name" in command("register", to).error
    outcome = command("register", to, "--name", "ict")
    assert outcome.out == "ict version 2: the champion, version 1, was never scored\n"
    toolkit = model_at("models:/ict@champion").open()
    assert toolkit.schedules == steps == CONSISTENCY_IMAGENET64
    served = served_model(world.mlflow, "ict")
    rows = pd.DataFrame({"seed": [1, 2], "label": [0, 9]})
    assert len(served.predict(rows, params={"task": "generate", "nfe": 2})["image"]) == 2
    for wrong, params, said in (
        (rows.assign(label=[0, 10]), {"task": "generate"}, "needs one label in"),
        (rows[["seed"]], {"task": "generate"}, "needs one label in"),
        (rows, {"task": "invert"}, "no inverse direction"),
    ):
        with pytest.raises(MlflowException, match=said):
            served.predict(wrong, params=params)


def test_a_damaged_import_is_named(command: Command, file: Path):
    to = imported(command, file)
    (Path(to) / INDEX).write_text('{"k": 0}')
    assert f"{to}/{INDEX}: missing key 'network'" in command("register", to, "--name", "x").error
