"""Scores as rows: stored and read back unchanged, shown to people, named for MLflow."""

import json
import math
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from world import World

from bcm import inference
from bcm.timesteps import PAPER_CIFAR10, PUBLISHED
from pipelines.errors import ConfigError
from pipelines.evaluation import shards
from pipelines.evaluation.features import PIXELS, as_images
from pipelines.evaluation.scores import FILE, Score, Scores, read_scores, table, write_scores
from pipelines.models.source import model_at
from pipelines.tracking.client import score_names

REAL = Score(
    metric="fd-pixels",
    task="real",
    nfe=0,
    value=0.5,
    error=None,
    count=297,
    seeds=None,
    extractor=PIXELS,
    steps=None,
)
SAMPLED = replace(REAL, task="sample", nfe=1, value=2.0, count=100, seeds=(0, 99), steps=PAPER_CIFAR10["sample-1"])
BACK = Score(
    metric="mse",
    task="reconstruct",
    nfe=4,
    value=0.0125,
    error=0.0005,
    count=297,
    seeds=(0, 296),
    extractor=None,
    steps=PAPER_CIFAR10["invert-4"],
)
KEPT = replace(BACK, metric="labels-kept", value=0.875, error=0.02)
ROWS = (REAL, SAMPLED, BACK, KEPT)


def stored(home: Path, *rows: Score) -> str:
    write_scores(str(home), Scores(k=7, ema_rate=None, schedules=PAPER_CIFAR10, rows=rows))
    return str(home)


def test_rows_survive_storage(tmp_path: Path):
    assert read_scores(stored(tmp_path, *ROWS), 7, PAPER_CIFAR10) == ROWS


def test_a_distance_that_is_not_finite_survives_storage(tmp_path: Path):
    far, broken = replace(SAMPLED, value=math.inf), replace(BACK, value=math.nan, error=math.nan)
    read = read_scores(stored(tmp_path, far, broken), 7, PAPER_CIFAR10)
    assert read[0] == far
    assert math.isnan(read[1].value) and read[1].error is not None and math.isnan(read[1].error)


def test_scores_of_other_time_steps_are_refused(tmp_path: Path):
    home = stored(tmp_path, *ROWS)
    moved = {**PAPER_CIFAR10, "sample-2": PUBLISHED["imagenet64"]["sample-2"]}
    with pytest.raises(ConfigError, match=r"time steps of .* have changed"):
        read_scores(home, 7, moved)
    with pytest.raises(ConfigError, match="those of step 7, but it is at step 8"):
        read_scores(home, 8, PAPER_CIFAR10)
    with pytest.raises(ConfigError, match="those of the average that serves"):
        read_scores(home, 7, PAPER_CIFAR10, 0.5)


@pytest.mark.parametrize("key", ["error", "seeds", "steps", "extractor", "steps.t_min"])
def test_a_row_says_all_of_itself(tmp_path: Path, key: str):
    home = stored(tmp_path, replace(SAMPLED, nfe=3, steps=PAPER_CIFAR10["sample-3"]))
    entry = json.loads((tmp_path / FILE).read_text())
    *before, last = key.split(".")
    del reduce(lambda holder, name: holder[name], before, entry["rows"][0])[last]
    (tmp_path / FILE).write_text(json.dumps(entry))
    with pytest.raises(ConfigError, match=rf"missing key 'rows.0.{key}'.*pipelines.evaluate"):
        read_scores(home, 7, PAPER_CIFAR10)


def test_the_table_has_a_line_for_each_nfe():
    lines = [" ".join(line.split()) for line in table(ROWS).splitlines()]
    assert lines == [
        "NFE Frechet / test MSE labels kept",
        "test 0.5000 1.00",
        "1 2.0000 4.00",
        "4 0.01250 87.5%",
    ]


def test_names_for_mlflow_are_those_of_earlier_runs():
    assert score_names(ROWS) == {
        "frechet_test": 0.5,
        "frechet_nfe1": 2.0,
        "frechet_ratio_nfe1": 4.0,
        "mse_nfe4": 0.0125,
        "labels_kept_nfe4": 0.875,
    }
    assert score_names([SAMPLED]) == {"frechet_nfe1": 2.0}, "no ratio without the real images' distance"


def test_a_batch_is_reconstructed_with_the_seeds_of_its_place(world: World):
    toolkit = model_at(str(world.run)).open()
    size = (toolkit.network.image_channels, toolkit.network.resolution, toolkit.network.resolution)
    images = np.random.default_rng(0).integers(0, 256, (6, *size), dtype=np.uint8)
    labels = np.zeros(6, np.int64)
    back = inference.reconstruct(toolkit, as_images(images), range(6), 2)
    wanted = (((back.clamp(-1, 1) - as_images(images)) / 2) ** 2).flatten(1).mean(1)
    errors, whole = shards.reconstruction(toolkit, (images[4:], labels[4:]), 4, 2, True)
    assert torch.allclose(whole, back[4:], atol=1e-5) and torch.allclose(errors.float(), wanted[4:], atol=1e-6)
    assert len(shards.reconstruction(toolkit, (images[4:], labels[4:]), 4, 2, False)[1]) == 0
